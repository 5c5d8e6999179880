"""Makes a frame of a row of an ASE database, whatever file the row lay in."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.sources.base import Frame, FrameError, ReadOptions, Reason
from equipot.train.sources.labelled import labelled_frame
from equipot.train.sources.labels import find_charge_and_spin, find_labels


def row_frame(index: int, row: Mapping[str, Any], options: ReadOptions) -> Frame:
    """A frame of a row as named values: numbers, positions, cell, pbc, labels, key_value_pairs, data.

    Raises:
        FrameError: it has no atoms, no energy, or anything of the wrong shape.
    """
    if "numbers" not in row or "positions" not in row:
        raise FrameError(Reason.INVALID, f"no atoms; keys there: {', '.join(sorted(row))}")
    numbers = np.reshape(row["numbers"], -1)
    cell = np.reshape(np.asarray(row.get("cell", np.zeros(9)), dtype=np.float64), (3, 3))
    pbc = np.reshape(row.get("pbc", (False,) * 3), 3).astype(np.bool_)
    data = row.get("data") if isinstance(row.get("data"), Mapping) else {}
    pairs = row.get("key_value_pairs") if isinstance(row.get("key_value_pairs"), Mapping) else {}
    info = {**(data or {}), **(pairs or {})}
    labels = find_labels({**info, **row}, len(numbers), cell, pbc, options)
    charge, spin = find_charge_and_spin(info)
    key = next((key for key in options.group_keys if isinstance(info.get(key), str | int)), None)
    return labelled_frame(
        index,
        atomic_numbers=numbers,
        positions=row["positions"],
        cell=cell,
        pbc=pbc,
        energy=labels.energy,
        forces=labels.forces,
        stress=labels.stress,
        charge=charge,
        spin_multiplicity=spin,
        group=None if key is None else (key, str(info[key])),
        name=str(info.get("sid", info.get("name", ""))),
        extras={
            "tags": row.get("tags"),
            "fixed": _fixed(row.get("constraints"), len(numbers)),
            "magmoms": row.get("magmoms"),
        },
        notes=[note for note in labels.notes if not note.code.startswith("forces: absent")],
    )


def _fixed(constraints: Any, n_atoms: int) -> NDArray[np.bool_] | None:  # noqa: ANN401 - JSON
    if not isinstance(constraints, list):
        return None
    fixed = np.zeros(n_atoms, dtype=np.bool_)
    for constraint in constraints:
        if isinstance(constraint, dict) and constraint.get("name") == "FixAtoms":
            indices = np.reshape(constraint.get("kwargs", {}).get("indices", []), -1)
            if len(indices) and (indices.min() < 0 or indices.max() >= n_atoms):
                raise FrameError(Reason.INVALID, f"a fixed atom {indices.max()} of {n_atoms}")
            fixed[indices.astype(np.int64)] = True
    return fixed
