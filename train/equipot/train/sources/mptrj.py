"""MPtrj: `MPtrj_2022.9_full.json`, mp-id → frame id → structure and labels, streamed.

Deng et al., Nat. Mach. Intell. 5, 1031 (2023), doi:10.1038/s42256-023-00716-3. Energies come twice: as
computed (uncorrected) and with the Materials Project's MP2020 corrections, which depend on the composition
alone and make GGA and GGA+U compatible; potentials of the field differ in which they take, so the level names
it. Stress is VASP's: kbar, positive in compression. Frames of one mp-id stay together in a split.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from equipot.train.errors import DataError
from equipot.train.sources.base import (
    Frame,
    FrameError,
    Note,
    ReadOptions,
    Reason,
    Rejected,
    Source,
    require_file,
)
from equipot.train.sources.json_stream import JsonDamage, JsonStream
from equipot.train.sources.labelled import labelled_frame
from equipot.train.sources.pymatgen_structure import read_structure, stress_from_kbar

LEVELS: Mapping[str, str] = {
    "uncorrected": "PBE or PBE+U (MPRelaxSet), uncorrected energy",
    "corrected": "PBE or PBE+U (MPRelaxSet), MP2020-corrected energy",
}


class Mptrj:
    """One file as a `Reader`."""

    format = "mptrj"
    count = None

    def __init__(self, path: Path, level: str) -> None:
        self._path = path
        self._energy = f"{level}_total_energy"
        self._fraction = 0.0
        self._check_start()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def fraction(self) -> float | None:
        """Share of the file read so far."""
        return self._fraction

    def _check_start(self) -> None:
        require_file(self._path)
        try:
            first = next(self._entries(), None)
        except JsonDamage as error:
            raise DataError(f"{self._path}: cannot be read as MPtrj's JSON ({error}); get it again") from None
        body = first[2] if first is not None else None
        if not isinstance(body, Mapping) or "structure" not in body:
            raise DataError(
                f"{self._path}: is not laid out as MPtrj (mp-id, frame id, and there a structure); give "
                "another file, or import it by its own format"
            )

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields frame `start` and those after it."""
        index = 0
        try:
            for material, frame_id, body in self._entries():
                if index >= start:
                    yield self._frame(index, material, frame_id, body)
                index += 1
        except JsonDamage as error:
            if index >= start:
                yield Rejected(index, Reason.UNREADABLE, f"{error}; the rest of the file is lost")
        self._fraction = 1.0

    def _entries(self) -> Iterator[tuple[str, str, object]]:
        with JsonStream(self._path) as stream:
            if stream.peek() != "{":
                raise JsonDamage(f"it begins with {stream.peek()!r}, not with an object")
            for _ in stream.entries():
                material = stream.key()
                if stream.peek() != "{":
                    raise JsonDamage(f"{material} is not an object of frames")
                for _ in stream.entries():
                    frame_id = stream.key()
                    body = stream.value()
                    self._fraction = stream.fraction
                    yield material, frame_id, body

    def _frame(self, index: int, material: str, frame_id: str, body: object) -> Frame | Rejected:
        try:
            if not isinstance(body, Mapping):
                raise FrameError(Reason.UNREADABLE, f"a {type(body).__name__} instead of named values")
            structure = read_structure(body.get("structure"))
            energy, stress = body.get(self._energy), body.get("stress")
            if energy is None:
                raise FrameError(Reason.NO_LABEL, f"{self._energy} is absent")
            magmoms = body.get("magmom")
            notes = () if magmoms is not None else (Note("magmom: absent", frame_id),)
            return labelled_frame(
                index,
                atomic_numbers=structure.atomic_numbers,
                positions=structure.positions,
                cell=structure.cell,
                pbc=structure.pbc,
                energy=energy,
                forces=body.get("force"),
                stress=None if stress is None else stress_from_kbar(stress),
                charge=structure.charge,
                group=("mp_id", material),
                name=frame_id,
                extras={"magmoms": np.array(magmoms, dtype=np.float64) if magmoms is not None else None},
                notes=notes,
            )
        except FrameError as error:
            return Rejected(index, error.reason, f"{frame_id}: {error.detail}")
        except (TypeError, ValueError) as error:
            return Rejected(index, Reason.WRONG_SHAPE, f"{frame_id}: {error}"[:200])


def open_mptrj(path: Path, options: ReadOptions) -> Mptrj:
    """Opens the release's file. DataError if it is not one."""
    return Mptrj(path, options.level or next(iter(LEVELS)))


SOURCE = Source(
    name="mptrj",
    open=open_mptrj,
    levels=LEVELS,
    licence="CC-BY-4.0",
    files=("MPtrj*.json",),
    extras=("magmoms",),
)
