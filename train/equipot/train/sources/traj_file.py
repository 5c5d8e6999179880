"""Relaxations as ASE `.traj` files, one system a file, as the OC20 and OC22 releases have them.

Labels are taken as stored: ASE's own getters set the forces on fixed atoms to zero.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase.constraints import FixAtoms
from ase.io.trajectory import TrajectoryReader

from equipot.train.errors import DataError
from equipot.train.sources.base import Frame, FrameError, Reason, Rejected, require_file
from equipot.train.sources.labelled import labelled_frame

_ULM_MAGIC = b"- of Ulm"


class Trajectory:
    """One file as a `Reader`.

    Args:
        path: the file; its name without the suffix is the system's.
        format: what the manifest calls it.
        key, prefix: what the group is called.
        reference: energy in eV to take off each frame's.
    """

    def __init__(
        self, path: Path, *, format: str, key: str, prefix: str = "", reference: float = 0.0
    ) -> None:
        self._path = path
        self.format = f"{format}-traj"
        self._system = path.name.split(".")[0]
        self._group = (key, prefix + self._system)
        self._reference = reference
        self._done = 0.0
        require_file(path)
        with path.open("rb") as file:
            if file.read(len(_ULM_MAGIC)) != _ULM_MAGIC:  # older ones are pickles, which ASE would unpickle
                raise DataError(f"{path}: is not a trajectory of ASE ≥ 3.10; convert it, or get it again")
        with self._open() as reader:
            self._count = len(reader)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def count(self) -> int | None:
        """Number of frames."""
        return self._count

    def fraction(self) -> float | None:
        """Share of the frames read so far."""
        return self._done

    def _open(self) -> TrajectoryReader:
        try:
            reader = TrajectoryReader(self._path)
            if len(reader) == 0:
                raise DataError(f"{self._path}: holds no frame")
            return reader
        except DataError:
            raise
        except Exception as error:  # ASE raises what its decoders raise
            what = f"{type(error).__name__}: {error}"[:150]
            raise DataError(f"{self._path}: cannot be read as a trajectory ({what}); get it again") from None

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields frame `start` and those after it."""
        with self._open() as reader:
            for index in range(start, len(reader)):
                self._done = index / len(reader)
                try:
                    yield self._frame(index, reader[index])
                except FrameError as error:
                    yield Rejected(index, error.reason, error.detail)
                except Exception as error:  # a damaged frame: whatever ASE's decoders raise
                    detail = f"{type(error).__name__}: {error}"[:200]
                    yield Rejected(index, Reason.UNREADABLE, detail)
            self._done = 1.0

    def _frame(self, index: int, atoms: ase.Atoms) -> Frame:
        results: Mapping[str, Any] = {} if atoms.calc is None else atoms.calc.results
        energy = results.get("energy")
        fixed = np.zeros(len(atoms), dtype=np.bool_)
        for constraint in atoms.constraints:
            if isinstance(constraint, FixAtoms):
                fixed[constraint.index] = True
        return labelled_frame(
            index,
            atomic_numbers=atoms.numbers,
            positions=atoms.positions,
            cell=atoms.cell.array,
            pbc=np.asarray(atoms.pbc, dtype=np.bool_),
            energy=None if energy is None else energy - self._reference,
            forces=results.get("forces"),
            group=self._group,
            name=f"{self._system}/frame{index}",
            extras={"tags": atoms.get_tags(), "fixed": fixed},
        )
