"""What a log line may show of a request's structures, if the operator wants them in the log at all."""

from __future__ import annotations

from equipot.wire.v1.codec import StructureArrays

LOGGED_ATOMS = 1_000
"""Atoms of one request that a log line holds at most."""


def excerpt(structures: StructureArrays) -> list[dict[str, object]]:
    """The first structures of a request, in Å, as many as have room."""
    shown: list[dict[str, object]] = []
    start = 0
    for index, count in enumerate(structures.n_atoms.tolist()):
        if start >= LOGGED_ATOMS:
            break
        atoms = slice(start, min(start + count, LOGGED_ATOMS))
        shown.append(
            {
                "n_atoms": count,
                "atomic_numbers": structures.atomic_numbers[atoms].tolist(),
                "positions": structures.positions[atoms].tolist(),
                "cell": structures.cell[index].tolist(),
                "pbc": structures.pbc[index].tolist(),
                "charge": int(structures.charge[index]),
                "spin_multiplicity": int(structures.spin_multiplicity[index]),
            }
        )
        start += count
    return shown
