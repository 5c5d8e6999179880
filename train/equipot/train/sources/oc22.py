"""OC22 S2EF-Total: `data.0000.lmdb` …, pickled records of total energies; and relaxations as ASE `.traj`.

Tran et al., ACS Catal. 13, 3066 (2023), doi:10.1021/acscatal.2c05426. `sid` names the relaxation and `fid`
the frame in it, each a number or a tensor of one. The test split has no energies and no forces.

The frames of a `.traj` are grouped by the file's name. Which `sid` a trajectory is, only a separate table of
the release says, which is not read: trajectories and LMDB records of one system are in different groups, so
do not split a mix of both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equipot.train.sources.base import Frame, FrameError, Reader, ReadOptions, Reason, Source
from equipot.train.sources.labelled import PERIODIC, labelled_frame
from equipot.train.sources.pyg_lmdb import PygLmdb, single_number
from equipot.train.sources.traj_file import Trajectory

LEVELS: Mapping[str, str] = {"total": "PBE+U/PAW 500 eV (VASP), total energy"}


class Oc22(PygLmdb):
    """One LMDB file of the release as a `Reader`."""

    format = "oc22"

    def frame(self, index: int, fields: Mapping[str, Any]) -> Frame:
        """One record; every system is a slab, periodic in all three directions."""
        missing = [key for key in ("pos", "atomic_numbers", "cell") if key not in fields]
        if missing:
            raise FrameError(Reason.INVALID, f"no {missing[0]}; keys there: {', '.join(sorted(fields))}")
        sid, fid = single_number(fields.get("sid")), single_number(fields.get("fid"))
        if sid is None:
            raise FrameError(Reason.NO_GROUP, "the record has no sid")
        name = f"{sid:.0f}" if fid is None else f"{sid:.0f}/{fid:.0f}"
        if single_number(fields.get("oc22", 1)) == 0:
            raise FrameError(Reason.OTHER_LEVEL, f"{name}: it is marked as a record of OC20 (oc22=0)")
        if "y" not in fields:
            relaxed = "y_relaxed" in fields
            what = "an IS2RE record (y_relaxed)" if relaxed else "as in the test split, which has no targets"
            raise FrameError(Reason.NO_LABEL, f"{name}: no y, {what}")
        natoms = single_number(fields.get("natoms"))
        numbers = np.reshape(fields["atomic_numbers"], -1)
        if natoms is not None and natoms != len(numbers):
            raise FrameError(
                Reason.INVALID, f"{name}: natoms is {natoms:.0f}, atoms there are {len(numbers)}"
            )
        cell = np.asarray(fields["cell"])
        if cell.size != 9:
            raise FrameError(Reason.INVALID, f"{name}: cell has shape {cell.shape}, expected (1, 3, 3)")
        return labelled_frame(
            index,
            atomic_numbers=numbers,
            positions=fields["pos"],
            cell=cell.reshape(3, 3),
            pbc=PERIODIC,
            energy=single_number(fields["y"]),
            forces=fields.get("force", fields.get("forces")),
            group=("sid", f"oc22 {sid:.0f}"),
            name=name,
            extras={"tags": fields.get("tags"), "fixed": fields.get("fixed")},
        )


def open_oc22(path: Path, options: ReadOptions) -> Reader:
    """Opens an LMDB file or a trajectory of the release."""
    if path.suffix == ".traj":
        return Trajectory(path, format="oc22", key="sid", prefix="oc22 ")
    return Oc22(path, options)


SOURCE = Source(
    name="oc22",
    open=open_oc22,
    levels=LEVELS,
    licence="CC-BY-4.0",
    files=("*.lmdb", "*.traj"),
    extras=("tags", "fixed"),
)
