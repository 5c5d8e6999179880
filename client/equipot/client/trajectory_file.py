"""Trajectories into files as their frames come, and what is needed to go on with them. Knows no server."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import Trajectory, write
from ase.units import fs

from equipot.client.dynamics import MotionFrame, Restart, Resumed
from equipot.client.errors import FileError
from equipot.client.frames import whole_frames

_STEP = "equipot_step"
_HAS_STEP = re.compile(rb"\bequipot_step=(\d+)")
_TOKEN = re.compile(rb"equipot restart (\d+)\n")


class TrajectoryFile:
    """One trajectory in an extxyz file, or in one of ASE's own if its name ends in .traj.

    Beside it, while it is unfinished, lies its last restart token. A frame is in the file before the token
    that follows it, so whatever stops a run costs no frame: going on writes those behind the last whole one.

    Args:
        path: the file.
        resume: whether to go on with it; else what is there is written over.

    Raises:
        FileError: it is unfinished and not to be gone on with; it cannot be read or written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.token = path.with_name(path.name + ".token")
        self.reached = -1
        """The step of the last frame that is there."""
        self._binary = path.suffix == ".traj"
        self._resumed: bytes = b""
        if self.token.exists() and not resume:
            raise FileError(f"{path} is unfinished: go on with it by --resume, or remove {self.token}")
        try:
            if resume and path.exists():
                self._look()
            self._file: Any = self._open()
        except (OSError, ValueError) as error:
            raise FileError(f"cannot go on with {path}: {error}") from error

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes it; what was written stays."""
        self._file.close()

    @property
    def resumed(self) -> Resumed | None:
        """Where it goes on; None if it begins."""
        return Resumed(self._resumed, frames=self.reached) if self._resumed else None

    def write(self, frame: Atoms, moved: MotionFrame, model: str) -> None:
        """Appends a step of the trajectory of this frame.

        Raises:
            FileError: it cannot be written.
        """
        atoms = _moved(frame, moved, model)
        try:
            if self._binary:
                self._file.write(atoms)
            else:
                text = StringIO()
                write(text, atoms, format="extxyz")
                raw = memoryview(text.getvalue().encode())
                while raw:
                    raw = raw[self._file.write(raw) :]
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror}") from error
        self.reached = moved.step

    def keep(self, restart: Restart) -> None:
        """Makes this the state to go on from.

        Raises:
            FileError: it cannot be written.
        """
        beside = self.token.with_name(self.token.name + ".new")
        try:
            beside.write_bytes(b"equipot restart %d\n" % restart.step + restart.token)
            beside.replace(self.token)
        except OSError as error:
            raise FileError(f"cannot write {self.token}: {error.strerror}") from error

    def finish(self) -> None:
        """There is nothing to go on with any more."""
        self.token.unlink(missing_ok=True)

    def _look(self) -> None:
        if self.token.exists():
            raw = self.token.read_bytes()
            head = _TOKEN.match(raw)
            if head is None:
                raise ValueError(f"{self.token} is no restart token")
            self._resumed = raw[head.end() :]
        if self._binary:
            with Trajectory(self.path) as frames:
                self.reached = int(frames[-1].info[_STEP]) if len(frames) else -1
        else:
            self._end = 0
            for frame in whole_frames(self.path, _HAS_STEP):
                self.reached, self._end = frame.place, frame.end

    def _open(self) -> Any:  # noqa: ANN401  # ASE has no types
        goes_on = self.reached >= 0
        if self._binary:
            return Trajectory(self.path, "a" if goes_on else "w")
        if not goes_on:
            return self.path.open("wb", buffering=0)
        file = self.path.open("r+b", buffering=0)
        # Without what is torn at its end.
        file.truncate(self._end)
        file.seek(self._end)
        return file


def _moved(frame: Atoms, moved: MotionFrame, model: str) -> Atoms:
    """The frame of a file at this step."""
    atoms = Atoms(
        numbers=frame.numbers,
        positions=moved.positions,
        cell=moved.cell,
        pbc=frame.pbc,
        info=dict(frame.info),
    )
    atoms.set_masses(frame.get_masses())
    atoms.set_velocities(moved.velocities / fs)
    atoms.set_constraint(frame.constraints)
    atoms.info[_STEP] = moved.step
    atoms.info["equipot_temperature"] = moved.temperature
    atoms.info["equipot_model"] = model
    results = {"energy": moved.energy, "forces": moved.forces, "stress": moved.stress}
    atoms.calc = SinglePointCalculator(
        atoms, **{name: value for name, value in results.items() if value is not None}
    )
    return atoms
