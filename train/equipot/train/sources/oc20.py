"""OC20 S2EF: `N.extxyz.xz` with `N.txt.xz`, a line a frame; and relaxations as `.extxyz.xz` or `.traj`.

Chanussot et al., ACS Catal. 11, 6059 (2021), doi:10.1021/acscatal.0c04525. The energy of a frame is the raw
DFT energy; a line of the .txt is "randomSID,frameFID,reference_energy", and energy − reference is the
adsorption energy. A relaxation has its system's reference in `system.txt` ("randomSID,reference_energy")
beside it. Fixed atoms carry their forces. In the release, 199.txt has fewer lines than frames, and
20M/1050.extxyz is truncated.
"""

import lzma
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.sources import xyz_chunks
from equipot.train.sources.base import (
    Frame,
    FrameError,
    Note,
    Reader,
    ReadOptions,
    Reason,
    Rejected,
    Source,
    require_file,
)
from equipot.train.sources.extxyz_frame import ExtxyzFrame, parse_extxyz
from equipot.train.sources.labelled import labelled_frame
from equipot.train.sources.traj_file import Trajectory

LEVELS: Mapping[str, str] = {
    "total": "RPBE/PAW 350 eV (VASP), total energy",
    "referenced": "RPBE/PAW 350 eV (VASP), adsorption energy",
}


class Line:
    """One line of a companion file: the frame's system, its number there, and the reference energy in eV."""

    __slots__ = ("frame", "reference", "system")

    def __init__(self, text: str) -> None:
        words = text.strip().split(",")
        if len(words) != 3:
            raise ValueError(f"{text.strip()!r:.60} is not randomSID,frameFID,reference_energy")
        self.system, self.frame = words[0], words[1]
        self.reference = float(words[2])


class Oc20:
    """One S2EF file with its companion as a `Reader`."""

    format = "oc20-s2ef"
    count = None

    def __init__(self, path: Path, *, referenced: bool) -> None:
        self._path = path
        self._referenced = referenced
        self._fraction = 0.0
        self._companion = _companion(path)
        if self._companion is None:
            raise DataError(
                f"{path}: beside it there is no {_stem(path)}.txt.xz, which says the frames' systems and "
                "reference energies; put it there, or import the file without a source's name"
            )
        _check_start(path)

    @property
    def path(self) -> Path:
        """The file of structures."""
        return self._path

    def fraction(self) -> float | None:
        """Share of the file read so far."""
        return self._fraction

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields frame `start` and those after it, each with its line of the companion."""
        seen: dict[str, bytes] = {}
        lines = self._lines()
        index = -1
        for chunk in _chunks(self._path, self._note_fraction):
            if isinstance(chunk, Rejected):
                if chunk.index >= start:
                    yield chunk
                return
            index = chunk.index
            line = next(lines, None)
            item = self._take(chunk, line, seen)
            if index >= start:
                yield item
        left = sum(1 for _ in lines)
        if left and index + 1 >= start:
            what = f"the file ends after {index + 1} frames, {left} line(s) of {self._companion} have none"
            yield Rejected(index + 1, Reason.UNREADABLE, what)

    def _note_fraction(self, fraction: float) -> None:
        self._fraction = fraction

    def _take(
        self, chunk: xyz_chunks.Chunk, line: Line | str | None, seen: dict[str, bytes]
    ) -> Frame | Rejected:
        name = f"{line.system}/{line.frame}" if isinstance(line, Line) else "frame"
        try:
            parsed = parse_extxyz(chunk)
            if line is None:
                raise FrameError(Reason.NO_COMPANION, f"{self._companion} ends before this frame")
            if isinstance(line, str):
                raise FrameError(Reason.NO_COMPANION, f"{self._companion}: {line}")
            composition = np.sort(parsed.atomic_numbers).tobytes()
            if seen.setdefault(line.system, composition) != composition:
                raise FrameError(
                    Reason.NO_COMPANION,
                    f"{line.system} had another composition in a frame before: from there on the lines of "
                    f"{self._companion} and the frames do not belong together",
                )
            reference = line.reference if self._referenced else 0.0
            return slab_frame(chunk.index, parsed, reference, line.system, name)
        except FrameError as error:
            return Rejected(chunk.index, error.reason, error.detail)

    def _lines(self) -> Iterator[Line | str]:
        """The companion's lines; what is wrong with a line in its stead."""
        assert self._companion is not None
        try:
            stream, raw = xyz_chunks.open_stream(self._path.parent / self._companion)
            with raw, stream:
                for line in stream:
                    if line.strip():
                        try:
                            yield Line(line.decode("utf-8"))
                        except ValueError as error:
                            yield str(error)
        except (OSError, EOFError, lzma.LZMAError):
            return  # cut short: the frames after it have no line, which each of them says


class Relaxation:
    """One relaxation in extended xyz as a `Reader`; all frames are of the system the file is called after."""

    format = "oc20-relaxation"
    count = None

    def __init__(self, path: Path, reference: float) -> None:
        self._path = path
        self._system = _stem(path)
        self._reference = reference
        self._fraction = 0.0
        _check_start(path)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def fraction(self) -> float | None:
        """Share of the file read so far."""
        return self._fraction

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields frame `start` and those after it."""
        for chunk in _chunks(self._path, self._note_fraction):
            if chunk.index < start:
                continue
            if isinstance(chunk, Rejected):
                yield chunk
                return
            try:
                parsed = parse_extxyz(chunk)
                name = f"{self._system}/frame{chunk.index}"
                yield slab_frame(chunk.index, parsed, self._reference, self._system, name)
            except FrameError as error:
                yield Rejected(chunk.index, error.reason, error.detail)

    def _note_fraction(self, fraction: float) -> None:
        self._fraction = fraction


def slab_frame(index: int, parsed: ExtxyzFrame, reference: float, system: str, name: str) -> Frame:
    """A frame of a slab with an adsorbate; FrameError names it if it cannot be used."""
    try:
        energy = parsed.number("energy")
        if energy is None:
            raise FrameError(Reason.NO_LABEL, "no energy (as in the test split)")
        mask = parsed.column("move_mask")
        notes = () if parsed.pbc.all() else (Note("pbc: not periodic in all directions", name),)
        return labelled_frame(
            index,
            atomic_numbers=parsed.atomic_numbers,
            positions=parsed.positions,
            cell=parsed.cell,
            pbc=parsed.pbc,
            energy=energy - reference,
            forces=parsed.column("forces"),
            group=("sid", system),
            name=name,
            extras={"tags": parsed.column("tags"), "fixed": _fixed(mask)},
            notes=notes,
        )
    except FrameError as error:
        raise FrameError(error.reason, f"{name}: {error.detail}") from None


def _fixed(move_mask: NDArray[Any] | None) -> NDArray[np.bool_] | None:
    """Atoms that may not move in any direction; the mask has one column, or one for each."""
    if move_mask is None:
        return None
    return np.asarray(~move_mask.astype(np.bool_).reshape(len(move_mask), -1).any(axis=1))


def _chunks(path: Path, note: Callable[[float], None]) -> Iterator[xyz_chunks.Chunk | Rejected]:
    """The frames as text; at last a `Rejected` if the compressed stream is cut short or damaged."""
    size = path.stat().st_size
    index = -1
    stream, raw = xyz_chunks.open_stream(path)
    with raw, stream:
        try:
            for chunk in xyz_chunks.chunks(stream):
                index = chunk.index
                note(raw.tell() / size)
                yield chunk
        except (OSError, EOFError, lzma.LZMAError) as error:
            detail = f"{error or type(error).__name__}; the rest of the file is lost"
            yield Rejected(index + 1, Reason.UNREADABLE, detail)


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _companion(path: Path) -> str | None:
    for suffix in (".txt.xz", ".txt"):
        if (path.parent / (_stem(path) + suffix)).is_file():
            return _stem(path) + suffix
    return None


def _check_start(path: Path) -> None:
    require_file(path)
    try:
        line = xyz_chunks.first_line(path)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error or type(error).__name__}); get it again") from None
    if not xyz_chunks.is_header(line):
        raise DataError(f"{path}: is not extended xyz (its first line is {line[:40]!r}); give another file")


def _reference_of(path: Path) -> float:
    """Reference energy of a relaxation in eV, from system.txt beside it or one folder above."""
    for folder in (path.parent, path.parent.parent):
        for name in ("system.txt", "system.txt.xz"):
            listed = folder / name
            if listed.is_file():
                stream, raw = xyz_chunks.open_stream(listed)
                with raw, stream:
                    for line in stream:
                        system, _, energy = line.decode("utf-8", "replace").strip().partition(",")
                        if system == _stem(path):
                            try:
                                return float(energy)
                            except ValueError:
                                raise DataError(f"{listed}: {line!r:.60} is not randomSID,energy") from None
                raise DataError(
                    f"{listed}: has no line for {_stem(path)}; its frames have no adsorption energy"
                )
    raise DataError(
        f"{path}: --level referenced needs system.txt (randomSID,reference_energy) beside the file; "
        "put it there, or take --level total"
    )


def open_oc20(path: Path, options: ReadOptions) -> Reader:
    """Opens a file of the release: S2EF if a .txt lies beside it, else a relaxation of one system."""
    referenced = options.level == "referenced"
    relaxation = path.suffix == ".traj" or (_companion(path) is None and _stem(path).startswith("random"))
    reference = _reference_of(path) if relaxation and referenced else 0.0
    if path.suffix == ".traj":
        return Trajectory(path, format="oc20", key="sid", reference=reference)
    return Relaxation(path, reference) if relaxation else Oc20(path, referenced=referenced)


SOURCE = Source(
    name="oc20",
    open=open_oc20,
    levels=LEVELS,
    licence="CC-BY-4.0",
    files=("*.extxyz.xz", "*.extxyz", "*.traj"),
    extras=("tags", "fixed"),
)
