"""Files of structures through ASE: frames in one by one, frames with results out. Knows no server."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO, StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import iread, write

from equipot.client.certainty import ENERGY_NUMBERS, FORCES_NUMBERS, OUTSIDE, Certainty
from equipot.client.errors import FileError, describe
from equipot.client.relax import Relaxed
from equipot.client.results import Prediction
from equipot.wire.v1.codec import FloatArray

_PLACE = "equipot_place"
_HAS_PLACE = re.compile(rb"\bequipot_place=(\d+)")
_ASKED = "equipot_asked"
_HAS_ASKED = re.compile(r'\bequipot_asked="([^"]*)"')
_HAS_MODEL = re.compile(r'\bequipot_model=(?:"([^"]*)"|(\S+))')
_NO_MARKS = re.compile(rb' ?\bequipot_(?:place=\d+|asked="[^"]*")')
_RESULTS = ("energy", "free_energy", "forces", "stress")


class FrameReader:
    """The frames of any file ASE reads, one after the other.

    A file that breaks in the middle ends there, so that what was read before it is not lost; `check` then
    says so.

    Args:
        path: the file.

    Raises:
        FileError: it holds no frame that can be read.
    """

    def __init__(self, path: Path) -> None:
        self.n_read = 0
        self._path = path
        self._error: Exception | None = None
        self._frames = iread(path, index=":", do_not_split_by_at_sign=True)
        self._first = self._read()
        self.check()
        if self._first is None:
            raise FileError(f"{path} holds no structures")

    @property
    def first(self) -> Atoms:
        """The first frame, to decide by."""
        return self._first

    def __iter__(self) -> Iterator[Atoms]:
        """All frames, once."""
        frame = self._first
        while frame is not None:
            yield frame
            frame = self._read()

    def check(self) -> None:
        """Raises FileError if the file broke before its end."""
        if self._error is not None:
            where = f" after frame {self.n_read - 1}" if self.n_read else ""
            what = f"{type(self._error).__name__}: {self._error}"
            raise FileError(f"cannot read {self._path}{where}: {what}") from self._error

    def _read(self) -> Atoms | None:
        try:
            frame = next(self._frames, None)
        except Exception as error:  # ASE's readers raise whatever a broken file makes them stumble over
            self._error = error
            return None
        self.n_read += frame is not None
        return frame


class FrameWriter:
    """An extxyz file that gets its name when it is complete; what an interruption leaves is in `partial`.

    Args:
        path: the file.

    Raises:
        FileError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.n_written = 0
        self._complete = 0
        self._file: FileIO | None = None

    def __enter__(self) -> Self:
        """Opens the partial file."""
        try:
            self._file = self._open()
        except OSError as error:
            raise FileError(f"cannot write {self.partial}: {error.strerror}") from error
        return self

    def write(self, frame: Atoms) -> None:
        """Appends one frame."""
        assert self._file is not None
        text = StringIO()
        write(text, frame, format="extxyz")
        raw = text.getvalue().encode()
        unwritten = memoryview(raw)
        try:
            # Not buffered, so that a full disk is met by the frame that found it full.
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError as error:
            raise FileError(f"cannot write {self.partial}: {error.strerror}") from error
        self._complete += len(raw)
        self.n_written += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Names the file if all went well; keeps the partial file if it holds frames."""
        assert self._file is not None
        try:
            if error is not None:
                # An interruption may have come in the middle of a frame.
                self._file.truncate(self._complete)
            self._file.close()
            if error is None:
                self._name()
            elif not self.n_written:
                self.partial.unlink()
        except OSError as broken:
            raise FileError(f"cannot write {self.path}: {broken.strerror}") from broken

    def _open(self) -> FileIO:
        return self.partial.open("wb", buffering=0)

    def _name(self) -> None:
        self.partial.replace(self.path)


class UnorderedWriter(FrameWriter):
    """As `FrameWriter`, of frames that come in any order and stand in theirs once all are there.

    Args:
        path: the file.
        resume: whether the whole frames that a partial file has are kept.
        asked: the words of the command line that frames come from; those that are kept must come from the
            same. Empty: whoever writes them knows otherwise that they do.

    Raises:
        FileError: what is there comes from other words.
    """

    def __init__(self, path: Path, *, resume: bool, asked: str = "") -> None:
        super().__init__(path)
        self._resume = resume
        # As it can stand between quotes, spaces and all.
        self._asked = re.sub(r'["\\\n]', "'", asked)
        self.kept: dict[int, str] = {}
        """Comment lines of the frames that were there already, by their place."""

    @property
    def model(self) -> str:
        """The bundle that those came from, as it is asked for; empty if none of them says."""
        found = (_HAS_MODEL.search(comment) for comment in self.kept.values())
        return next((one[1] or one[2] for one in found if one is not None), "")

    def add(self, place: int, frame: Atoms) -> None:
        """Appends the frame of this place."""
        frame.info[_PLACE] = place
        if self._asked:
            frame.info[_ASKED] = self._asked
        self.write(frame)

    def _open(self) -> FileIO:
        if not (self._resume and self.partial.exists()):
            return super()._open()
        frames = list(whole_frames(self.partial))
        for frame in frames if self._asked else ():
            found = _HAS_ASKED.search(frame.comment)
            if found is None or found[1] != self._asked:
                theirs = found[1] if found else "other words"
                raise FileError(
                    f"{self.partial} comes from {theirs}, not from {self._asked}: give those to go on with"
                    " it, or leave --resume out to begin anew"
                )
        self.kept = {frame.place: frame.comment for frame in frames}
        self.n_written, self._complete = len(frames), frames[-1].end if frames else 0
        file = self.partial.open("r+b", buffering=0)
        file.truncate(self._complete)
        file.seek(self._complete)
        return file

    def _name(self) -> None:
        """Copies the frames in order, as they are but for our marks, and then names them."""
        ordered = self.path.with_name(self.path.name + ".ordered")
        with self.partial.open("rb") as source, ordered.open("wb") as target:
            for frame in sorted(whole_frames(self.partial), key=lambda frame: frame.place):
                source.seek(frame.start)
                target.write(_NO_MARKS.sub(b"", source.read(frame.end - frame.start), count=2))
        ordered.replace(self.path)
        self.partial.unlink()


@dataclass(frozen=True, slots=True)
class WrittenFrame:
    """Where one frame lies in an extxyz file, and which it is."""

    place: int
    start: int
    end: int
    comment: str


def whole_frames(path: Path, mark: re.Pattern[bytes] = _HAS_PLACE) -> Iterator[WrittenFrame]:
    """The whole frames that a file of ours begins with; what is torn at its end is left out.

    Their places are what `mark` finds in their comments: by default that of `UnorderedWriter`.
    """
    start = 0
    with path.open("rb") as file:
        while (line := file.readline()).strip().isdigit():
            lines = [file.readline() for _ in range(int(line) + 1)]
            place = mark.search(lines[0])
            if place is None or not lines[-1].endswith(b"\n"):
                return
            yield WrittenFrame(int(place[1]), start, file.tell(), lines[0].decode())
            start = file.tell()


def sum_of(frames: Iterable[Atoms]) -> str:
    """Of all that a server is told of structures: the same for two files if nothing of it differs."""
    total = hashlib.sha256()
    for frame in frames:
        told = [frame.info.get(name) for name in ("charge", "spin_multiplicity", "spin")]
        held = [np.asarray(getattr(one, "index", ())).tolist() for one in frame.constraints]
        total.update(f"{len(frame)} {told} {held}".encode(errors="backslashreplace"))
        moving = [frame.arrays[name] for name in ("momenta", "masses") if name in frame.arrays]
        for array in (frame.numbers, frame.positions, frame.cell[:], frame.pbc, *moving):
            total.update(np.ascontiguousarray(array).tobytes())
    return f"sha256:{total.hexdigest()[:16]}"


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What a file says about a frame: energy in eV, forces (n, 3) in eV/Å; None where it says nothing."""

    energy: float | None
    forces: FloatArray | None


def labels_of(frame: Atoms) -> Labels:
    """The frame's own labels: what it calls its reference, or what ASE took for a calculator's results."""
    # What an earlier prediction left is no label.
    labelled = frame.calc is not None and "equipot_model" not in frame.info
    results = frame.calc.results if labelled else {}
    energy: Any = results.get("energy")
    forces: Any = results.get("forces")
    for prefix in ("REF", "reference"):
        energy = frame.info.get(f"{prefix}_energy", energy)
        forces = frame.arrays.get(f"{prefix}_forces", forces)
    has_energy = isinstance(energy, int | float | np.floating) and np.isfinite(energy)
    has_forces = np.shape(forces) == (len(frame), 3) and np.isfinite(forces).all()
    return Labels(
        energy=float(energy) if has_energy else None,
        forces=np.asarray(forces, dtype=np.float64) if has_forces else None,
    )


def with_results(frame: Atoms, prediction: Prediction) -> Atoms:
    """A copy of the frame that carries the prediction, or the reason why there is none.

    The file's own labels move to `reference_energy` and `reference_forces`, so that the two are not confused.
    """
    labels = labels_of(frame)
    frame = frame.copy()
    for name in _RESULTS:
        frame.info.pop(name, None)
        frame.arrays.pop(name, None)
    if labels.energy is not None:
        frame.info["reference_energy"] = labels.energy
    if labels.forces is not None:
        frame.arrays["reference_forces"] = labels.forces
    told = (f"equipot_{name}" for name in (*ENERGY_NUMBERS, *FORCES_NUMBERS, "domain_score"))
    for name in ("equipot_model", "equipot_level_of_theory", "equipot_failure", OUTSIDE, *told):
        frame.info.pop(name, None)
        frame.arrays.pop(name, None)
    if prediction.model is not None:
        frame.info["equipot_model"] = prediction.model.pinned
        frame.info["equipot_level_of_theory"] = prediction.model.level_of_theory
    if prediction.failure is not None:
        frame.info["equipot_failure"] = " ".join(describe(prediction.failure).split())
        return frame
    results: dict[str, Any] = {"energy": prediction.energy, "forces": prediction.forces}
    if prediction.stress is not None and frame.pbc.all():
        results["stress"] = prediction.stress
    write_certainty(frame, prediction.uncertainty)
    frame.calc = SinglePointCalculator(frame, **results)
    return frame


def write_certainty(frame: Atoms, known: Certainty | None) -> None:
    """Writes into a frame how sure its results are."""
    if known is None:
        return
    for name, value in known.numbers().items():
        (frame.arrays if name in FORCES_NUMBERS else frame.info)[f"equipot_{name}"] = value
    if known.domain is not None and known.domain.outside:
        frame.info[OUTSIDE] = " ".join(known.domain.reason.split())


def with_relaxed(frame: Atoms, relaxed: Relaxed) -> Atoms:
    """A copy of the frame where it came to rest, with its results; or as it was, with the reason why not."""
    prediction = Prediction(
        relaxed.energy, relaxed.forces, relaxed.stress, relaxed.failure, relaxed.model, relaxed.uncertainty
    )
    moved = frame.copy()
    if relaxed.failure is None:
        moved.set_cell(relaxed.cell)
        moved.set_positions(relaxed.positions, apply_constraint=False)
        moved.info["equipot_converged"] = relaxed.converged
        moved.info["equipot_steps"] = relaxed.steps
    return with_results(moved, prediction)


class Comparison:
    """Mean absolute errors against the labels of a file, gathered frame by frame."""

    def __init__(self) -> None:
        self.n_energies = self.n_components = 0
        self._energy = self._forces = 0.0

    def add(self, labels: Labels, prediction: Prediction) -> None:
        """Takes one frame into account, if it has labels and was predicted."""
        if prediction.failure is not None or prediction.forces is None:
            return
        if labels.energy is not None:
            self.n_energies += 1
            self._energy += abs(prediction.energy - labels.energy) / len(prediction.forces)
        if labels.forces is not None:
            self.n_components += labels.forces.size
            self._forces += float(np.abs(prediction.forces - labels.forces).sum())

    @property
    def energy(self) -> float:
        """MAE of the energy in eV/atom; NaN without labels."""
        return self._energy / self.n_energies if self.n_energies else float("nan")

    @property
    def forces(self) -> float:
        """MAE of the force components in eV/Å; NaN without labels."""
        return self._forces / self.n_components if self.n_components else float("nan")
