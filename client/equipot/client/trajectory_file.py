"""Trajectories into files as their frames come, and what is needed to go on with them. Knows no server."""

from __future__ import annotations

import os
import re
from io import StringIO
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import Trajectory, write
from ase.io.extxyz import key_val_str_to_dict
from ase.units import fs

from equipot.client.dynamics import Ended, MotionFrame, Restart
from equipot.client.errors import FileError, describe
from equipot.client.frames import whole_frames, write_certainty
from equipot.client.open_files import OpenFiles

_STEP, _SEED, _MODEL, _FAILURE = "equipot_step", "equipot_seed", "equipot_model", "equipot_failure"
LARGEST_SEED_WRITTEN = 2**63 - 1
"""Beyond it readers of extxyz take a number for a float."""

_HAS_STEP = re.compile(rb"\bequipot_step=(\d+)")
_TOKEN = re.compile(rb"equipot restart \d+(?: seed (\d+))?\n")


class TrajectoryFile:
    """One trajectory in an extxyz file, or in one of ASE's own if its name ends in .traj.

    Beside it, while it is unfinished, lies its last restart token. A frame is in the file before the token
    that follows it, so whatever stops a run costs no frame: going on writes those behind the last whole one.
    The frame of a failure that has a token beside it stays until something else is written behind the others.

    Args:
        path: the file.
        files: by which it is opened.
        resume: whether to go on with it; else what is there is written over.

    Raises:
        FileError: it is unfinished and not to be gone on with; it cannot be read or written.
    """

    def __init__(self, path: Path, files: OpenFiles, *, resume: bool) -> None:
        self.path = path
        self.token = path.with_name(path.name + ".token")
        self.reached = -1
        """The step of the last frame that is there."""
        self.restart: bytes = b""
        """The token that is there; empty if there is none."""
        self.seed: int | None = None
        """Of what was drawn; None if that is not known."""
        self.model = ""
        """The bundle that computed what is there."""
        self.failure = ""
        """Why it ended for good with the last frame that is there; empty if it did not."""
        self._files = files
        self._good_end: int | None = None
        """Where the frames end before that of a failure that may be overcome; None if there is none."""
        self._binary = path.suffix == ".traj"
        if self.token.exists() and not resume:
            raise FileError(f"{path} is unfinished: go on with it by --resume, or remove {self.token}")
        try:
            end = self._look() if resume and path.exists() else 0
            if self.reached < 0 and self._good_end is None:
                path.write_bytes(b"")
            elif not self._binary:
                # Without what is torn at its end.
                with path.open("r+b") as file:
                    file.truncate(end)
        except (OSError, ValueError) as error:
            raise FileError(f"cannot go on with {path}: {error}") from error

    @property
    def can_go_on(self) -> bool:
        """Whether what follows can be made to fit what is there."""
        return bool(self.restart) or self.seed is not None or self.reached < 0

    def write(self, frame: Atoms, moved: MotionFrame, model: str, seed: int | None) -> None:
        """Appends a step of the trajectory of this frame, by this bundle; the seed may not be known yet.

        Raises:
            FileError: it cannot be written.
        """
        self._append(_moved(frame, moved, model, seed))
        self.reached = moved.step

    def fail(self, frame: Atoms, ended: Ended) -> None:
        """Appends where the step led that failed, with the reason, if that is known.

        Raises:
            FileError: it cannot be written.
        """
        if ended.failure is None or ended.positions is None or self.reached > ended.steps:
            return
        self.failure = " ".join(describe(ended.failure).split())
        atoms = _bare(frame)
        atoms.set_cell(ended.cell)
        atoms.set_positions(ended.positions, apply_constraint=False)
        atoms.info[_STEP] = ended.steps + 1
        atoms.info[_FAILURE] = self.failure
        if ended.model is not None:
            atoms.info[_MODEL] = ended.model.pinned
        self._append(atoms)
        self.reached = ended.steps + 1

    def keep(self, restart: Restart, seed: int | None) -> None:
        """Makes this the state to go on from, of what has this seed if that is known.

        Raises:
            FileError: it cannot be written.
        """
        beside = self.token.with_name(self.token.name + ".new")
        try:
            of_seed = b"" if seed is None else b" seed %d" % seed
            beside.write_bytes(b"equipot restart %d%b\n" % (restart.step, of_seed) + restart.token)
            beside.replace(self.token)
        except OSError as error:
            raise FileError(f"cannot write {self.token}: {error.strerror}") from error

    def finish(self) -> None:
        """There is nothing to go on with any more."""
        self.token.unlink(missing_ok=True)

    def _append(self, atoms: Atoms) -> None:
        try:
            self._drop_failure()
            file = self._files.of(self, self._open)
            if self._binary:
                file.write(atoms)
                return
            text = StringIO()
            write(text, atoms, format="extxyz")
            raw = memoryview(text.getvalue().encode())
            while raw:
                raw = raw[file.write(raw) :]
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror}") from error

    def _drop_failure(self) -> None:
        """Takes the frame of a failure away that was overcome."""
        end, self._good_end = self._good_end, None
        if end is None:
            return
        if not self._binary:
            os.truncate(self.path, end)
            return
        beside = self.path.with_name(self.path.name + ".new")
        with Trajectory(self.path) as there, Trajectory(beside, "w") as kept:
            for place in range(end):
                kept.write(there[place])
        beside.replace(self.path)

    def _open(self) -> Any:  # noqa: ANN401  # ASE has no types
        return Trajectory(self.path, "a") if self._binary else self.path.open("ab", buffering=0)

    def _look(self) -> int:
        """What is there already; returns where the last whole frame ends."""
        if self.token.exists():
            raw = self.token.read_bytes()
            head = _TOKEN.match(raw)
            if head is None:
                raise ValueError(f"{self.token} is no restart token")
            self.restart = raw[head.end() :]
            self.seed = int(head[1]) if head[1] else None
        (before, good_end), (info, end) = self._last_two()
        if self.restart and _FAILURE in info:
            # There is a state to go on from, and whoever answers may be well by now.
            info, self._good_end = before, good_end
        if info:
            self.reached = int(info[_STEP])
            self.seed = int(info[_SEED]) if _SEED in info and self.seed is None else self.seed
            self.model = str(info.get(_MODEL, ""))
            self.failure = str(info.get(_FAILURE, ""))
        return end

    def _last_two(self) -> list[tuple[dict[str, Any], int]]:
        """What the last frames say, and where each ends: its byte, of ASE's own files their number."""
        if not self._binary:
            comments = [("", 0), ("", 0)]
            for one in whole_frames(self.path, _HAS_STEP):
                comments = [comments[1], (one.comment, one.end)]
            return [(key_val_str_to_dict(comment) if comment else {}, end) for comment, end in comments]
        if not self.path.stat().st_size:
            return [({}, 0), ({}, 0)]
        with Trajectory(self.path) as frames:
            ends = (max(0, len(frames) - 1), len(frames))
            return [(frames[end - 1].info if end else {}, end) for end in ends]


def _bare(frame: Atoms) -> Atoms:
    """The frame of a file without what anybody computed for it."""
    info = {name: value for name, value in frame.info.items() if not name.startswith("equipot_")}
    atoms = Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell, pbc=frame.pbc, info=info)
    atoms.set_masses(frame.get_masses())
    atoms.set_constraint(frame.constraints)
    return atoms


def _moved(frame: Atoms, moved: MotionFrame, model: str, seed: int | None) -> Atoms:
    """The frame of a file at this step."""
    atoms = _bare(frame)
    atoms.set_cell(moved.cell)
    atoms.set_positions(moved.positions, apply_constraint=False)
    # Those of atoms that stay are zero as they come.
    atoms.set_momenta(moved.velocities / fs * atoms.get_masses()[:, None], apply_constraint=False)
    atoms.info[_STEP] = moved.step
    if seed is not None and seed <= LARGEST_SEED_WRITTEN:
        atoms.info[_SEED] = seed
    atoms.info["equipot_temperature"] = moved.temperature
    atoms.info[_MODEL] = model
    write_certainty(atoms, moved.uncertainty)
    # What is not periodic has none.
    stress = moved.stress if atoms.pbc.all() else None
    results = {"energy": moved.energy, "forces": moved.forces, "stress": stress}
    atoms.calc = SinglePointCalculator(
        atoms, **{name: value for name, value in results.items() if value is not None}
    )
    return atoms
