"""Frames as the flat arrays that the store holds, some hundred at a time: what readers hand to the writer.

Everything that costs time is done in making a block (types, fingerprints, groups, limits), so that it can be
done by many processes; what is left to the one writer is copying. Knows neither files nor processes.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.arrays import Field, per_atom, per_structure
from equipot.train.grouping import GroupRule
from equipot.train.sources.base import EXTRAS, Frame, FrameError, Reason, Rejected

BLOCK_FRAMES = 256
BLOCK_ATOMS = 2**14
"""A block is full at either limit: one more frame may exceed the second."""
_ABSENT: Mapping[str, int] = {"tags": -1, "fixed": 0}
_ENERGY = struct.Struct("<d")
_NO_STRESS = np.full((3, 3), np.nan)


@dataclass(slots=True, eq=False)
class Block:
    """Consecutive frames of one file: those kept as arrays, those left out with their reasons.

    Attributes:
        stop: number of the frame after the last one.
        fraction: share of the file read so far, None if its reader does not tell.
        n_atoms: (n_kept,) atoms of each.
        structures: per-structure arrays by name, all but "source", which only the writer knows.
        atoms: per-atom arrays by name.
        with_forces, with_stress: (n_kept,) bool.
        made_from: (n_kept,) what each group was made from.
        names: (n_kept,) the source's own identifiers, "" where there is none.
        notes: (frame, code, detail).
        rejected: in the order of frames.
    """

    stop: int
    fraction: float | None
    n_atoms: NDArray[np.int64]
    structures: dict[str, NDArray[Any]]
    atoms: dict[str, NDArray[Any]]
    with_forces: NDArray[np.bool_]
    with_stress: NDArray[np.bool_]
    made_from: list[str]
    names: list[str]
    notes: list[tuple[int, str, str]]
    rejected: list[Rejected]

    def __len__(self) -> int:
        return len(self.n_atoms)

    def without(self, rows: Sequence[int], rejected: Sequence[Rejected]) -> "Block":
        """The block without some of its kept frames, which are left out for these reasons instead."""
        if not rows:
            return self
        keep = np.ones(len(self), dtype=np.bool_)
        keep[list(rows)] = False
        gone = {item.index for item in rejected}
        atoms = np.repeat(keep, self.n_atoms)
        return Block(
            stop=self.stop,
            fraction=self.fraction,
            n_atoms=self.n_atoms[keep],
            structures={name: array[keep] for name, array in self.structures.items()},
            atoms={name: array[atoms] for name, array in self.atoms.items()},
            with_forces=self.with_forces[keep],
            with_stress=self.with_stress[keep],
            made_from=[text for text, kept in zip(self.made_from, keep, strict=True) if kept],
            names=[name for name, kept in zip(self.names, keep, strict=True) if kept],
            notes=[note for note in self.notes if note[0] not in gone],
            rejected=sorted([*self.rejected, *rejected], key=lambda item: item.index),
        )

    def part(self, start: int, stop: int) -> "Block":
        """Kept frames `start` to `stop` alone, without what was left out."""
        first, last = int(self.n_atoms[:start].sum()), int(self.n_atoms[:stop].sum())
        return Block(
            stop=self.stop,
            fraction=self.fraction,
            n_atoms=self.n_atoms[start:stop],
            structures={name: array[start:stop] for name, array in self.structures.items()},
            atoms={name: array[first:last] for name, array in self.atoms.items()},
            with_forces=self.with_forces[start:stop],
            with_stress=self.with_stress[start:stop],
            made_from=self.made_from[start:stop],
            names=self.names[start:stop],
            notes=[],
            rejected=[],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockOptions:
    """How frames become blocks.

    Attributes:
        columns: optional arrays of the store.
        rule: what makes a group.
        max_force: eV/Å; frames with an atom that feels more are left out. None: no limit.
        frames, atoms: a block is full at either.
    """

    columns: tuple[str, ...]
    rule: GroupRule
    max_force: float | None = None
    frames: int = BLOCK_FRAMES
    atoms: int = BLOCK_ATOMS


@dataclass(slots=True)
class BlockBuilder:
    """Collects frames of one file; `checksum` is the file's."""

    options: BlockOptions
    checksum: str
    _frames: list[Frame] = field(default_factory=list)
    _groups: list[int] = field(default_factory=list)
    _made_from: list[str] = field(default_factory=list)
    _rejected: list[Rejected] = field(default_factory=list)
    _atoms: int = 0
    _stop: int = 0

    def add(self, item: Frame | Rejected) -> None:
        """Takes the next frame; one that the options leave out becomes a `Rejected`."""
        self._stop = item.index + 1
        if isinstance(item, Frame):
            try:
                group, made_from = self.options.rule.group_of(item, self.checksum)
                _check_forces(item, self.options.max_force)
            except FrameError as error:
                item = Rejected(item.index, error.reason, error.detail)
            else:
                self._frames.append(item)
                self._groups.append(group)
                self._made_from.append(made_from)
                self._atoms += len(item.atomic_numbers)
                return
        self._rejected.append(item)

    @property
    def full(self) -> bool:
        """Whether it is time to take the block."""
        count = len(self._frames) + len(self._rejected)
        return count >= self.options.frames or self._atoms >= self.options.atoms

    @property
    def empty(self) -> bool:
        """Whether nothing has been added since the last block."""
        return not self._frames and not self._rejected

    def take(self, fraction: float | None) -> Block:
        """What has been added since the last block."""
        frames = self._frames
        columns = self.options.columns
        block = Block(
            stop=self._stop,
            fraction=fraction,
            n_atoms=np.array([len(frame.atomic_numbers) for frame in frames], dtype=np.int64),
            structures={
                name: _structure_rows(name, kind, frames, self._groups)
                for name, kind in per_structure(columns).items()
                if name != "source"
            },
            atoms={name: _atom_rows(name, kind, frames) for name, kind in per_atom(columns).items()},
            with_forces=np.array([frame.forces is not None for frame in frames], dtype=np.bool_),
            with_stress=np.array([frame.stress is not None for frame in frames], dtype=np.bool_),
            made_from=self._made_from,
            names=[frame.name for frame in frames],
            notes=[(frame.index, note.code, note.detail) for frame in frames for note in frame.notes],
            rejected=self._rejected,
        )
        self._frames, self._groups, self._made_from, self._rejected = [], [], [], []
        self._atoms = 0
        return block


def _check_forces(frame: Frame, limit: float | None) -> None:
    if limit is None or frame.forces is None:
        return
    sizes = np.sqrt(np.einsum("ik,ik->i", frame.forces, frame.forces))
    atom = int(sizes.argmax())
    if sizes[atom] > limit:
        what = f"atom {atom} feels {sizes[atom]:.6g} eV/Å, the limit is {limit:g}"
        raise FrameError(Reason.LARGE_FORCE, f"{frame.name}: {what}" if frame.name else what)


def fingerprint(frame: Frame) -> int:
    """63 bits that are equal for frames with the same structure and labels to the last bit."""
    parts = (
        frame.atomic_numbers,
        frame.positions,
        frame.cell,
        frame.pbc,
        _ENERGY.pack(frame.energy),
        frame.forces,
        frame.stress,
    )
    digest = hashlib.blake2b(
        b"".join(
            b"-" if part is None else part if isinstance(part, bytes) else part.tobytes() for part in parts
        )
        + f"{frame.charge} {frame.spin_multiplicity}".encode(),
        digest_size=8,
    )
    return int.from_bytes(digest.digest(), "little") >> 1


def _structure_rows(name: str, kind: Field, frames: Sequence[Frame], groups: Sequence[int]) -> NDArray[Any]:
    """A per-structure array of these frames, in the type it has on disk."""
    if name == "group":
        rows: list[Any] = list(groups)
    elif name == "frame":
        rows = [frame.index for frame in frames]
    elif name == "stress":
        rows = [_NO_STRESS if frame.stress is None else frame.stress for frame in frames]
    elif name == "fingerprint":
        rows = [fingerprint(frame) for frame in frames]
    elif name == "name":
        rows = [frame.name.encode("utf-8") for frame in frames]
    else:
        rows = [getattr(frame, name) for frame in frames]
    return np.array(rows, dtype=kind.dtype).reshape(len(frames), *kind.row)


def _atom_rows(name: str, kind: Field, frames: Sequence[Frame]) -> NDArray[Any]:
    """A per-atom array of these frames, in the type it has on disk."""
    if not frames:
        return np.empty((0, *kind.row), dtype=kind.dtype)
    values = [frame.extras.get(name) if name in EXTRAS else getattr(frame, name) for frame in frames]
    rows = [
        np.full((len(frame.atomic_numbers), *kind.row), _ABSENT.get(name, np.nan), dtype=kind.dtype)
        if value is None
        else value
        for frame, value in zip(frames, values, strict=True)
    ]
    return np.concatenate(rows).astype(kind.dtype, copy=False)
