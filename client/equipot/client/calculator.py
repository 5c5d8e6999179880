"""ASE's calculator over the network, pinned to the bundle that answered first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from equipot.client.certainty import OUTSIDE, Uncertainty
from equipot.client.credentials import Tls
from equipot.client.errors import (
    ClientError,
    InvalidStructure,
    LimitExceeded,
    ModelChanged,
    ModelNotFound,
    StructureFailure,
    refused,
)
from equipot.client.results import ModelReference, Predictions
from equipot.client.session import Session
from equipot.client.structures import Structure, charge_and_spin, from_atoms
from equipot.client.sync import Client

try:
    from ase import Atoms
    from ase.calculators.calculator import (
        Calculator,
        PropertyNotImplementedError,
        all_changes,
    )
    from ase.stress import full_3x3_to_voigt_6_stress
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "EquipotCalculator needs ASE: pip install 'equipot[ase]'", name=error.name
    ) from error


class EquipotCalculator(Calculator):  # type: ignore[misc]  # ASE has no types
    """Energies, forces and stress for ASE from an equipot server.

    Charge and spin multiplicity are taken from `atoms.info` ("charge", and "spin_multiplicity" or "spin"); a
    change of them asks anew. After the first answer the calculator asks for that very bundle, so that no
    trajectory changes its model on the way; `model_reference` says which it is. Stress is asked for only when
    it is read, and then for structures periodic in all three directions alone. After an error there are no
    results: a stale force is never returned. From the second answer for the same atoms on, steps go through a
    session: what does not change is not sent again, and the server keeps the neighbour list.

    Args:
        server: HOST:PORT, or a `Client` whose settings are wanted; a client stays its owner's to close.
        model: name, or "name@sha256:…"; empty: the client's, else the server's default.
        level_of_theory: one of the model's; empty: its only one.
        timeout: seconds for each calculation, another than the client's.
        tls: how to encrypt, and whom to trust, if `server` is an address; None: not encrypted.
        token: to show with each call, if `server` is an address.
        token_file: whose text is shown instead, read again when the file changes.
        uncertainty: whether answers say how sure they are, True or `Uncertainty` with a coverage of its own;
            `results` then hold what the model can tell of "energy_spread" and "energy_interval" (eV),
            "forces_spread" and "forces_interval" (n,) (eV/Å) and "domain_score", and `atoms.info` the reason
            as "equipot_outside_domain" if the structure is unlike any in training.

    Raises:
        ClientError: at construction for a bad address; in a calculation for everything else, see
            `equipot.client.errors`.
    """

    name = "equipot"
    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012  # as ASE has it

    def __init__(
        self,
        server: str | Client,
        *,
        model: str = "",
        level_of_theory: str = "",
        timeout: float | None = None,
        tls: Tls | None = None,
        token: str = "",
        token_file: str | os.PathLike[str] | None = None,
        uncertainty: bool | Uncertainty = False,
    ) -> None:
        if not isinstance(server, str) and (tls is not None or token or token_file is not None):
            raise ValueError("tls, token and token_file are the client's own: give them to the Client")
        self._client = (
            Client(server, tls=tls, token=token, token_file=token_file) if isinstance(server, str) else server
        )
        self._owns_client = isinstance(server, str)
        self._timeout = timeout
        self._uncertainty = uncertainty
        self.results: dict[str, Any]
        self.model_reference: ModelReference | None = None
        self._model_has_stress: bool | None = None
        # What was read for the last geometry is read for the next one too, more likely than not.
        self._last_read = {"forces"}
        self._read: set[str] = set()
        self._session: Session | None = None
        self._session_of: Structure | None = None
        self._session_refused = False
        super().__init__(model=model or self._client.model_name, level_of_theory=level_of_theory)

    def __enter__(self) -> Self:
        """The calculator itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the connection."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the session: a copy opens one of its own."""
        return {**self.__dict__, "_session": None, "_session_of": None}

    def close(self) -> None:
        """Closes the connection, if the calculator made it; the results stay."""
        self._leave_session()
        if self._owns_client:
            self._client.close()

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """What ASE writes into a trajectory: where the numbers come from."""
        described: dict[str, Any] = {"address": self._client.address, **super().todict(skip_default)}
        if self.model_reference is not None:
            described["model"] = self.model_reference.pinned
            described["level_of_theory"] = self.model_reference.level_of_theory
        return described

    def set(self, **parameters: str) -> dict[str, Any]:
        """Changes `model` or `level_of_theory`; the results go, and the next answer pins anew."""
        changed: dict[str, Any] = super().set(**parameters)
        if changed:
            self.reset()
            self._leave_session()
            self._session_refused = False
            self.model_reference = self._model_has_stress = None
        return changed

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; ASE itself does not look at charge and spin."""
        changes: list[str] = super().check_state(atoms, tol=tol)
        if self.atoms is not None and charge_and_spin(self.atoms.info) != charge_and_spin(atoms.info):
            changes.append("charge_and_spin")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:  # noqa: ANN401  # a float or an array
        """One property; asks the server if it is not known.

        Raises:
            PropertyNotImplementedError: stress of a structure not periodic in all three directions, or of a
                model without stress.
        """
        try:
            if name == "stress" and allow_calculation:
                self._check_stress(self.atoms if atoms is None else atoms)
            value = super().get_property(name, atoms, allow_calculation)
        except ClientError:
            self.results = {}
            raise
        if allow_calculation:
            self._read.add(name)
        return value

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Asks the server, and keeps its answer in `results`: eV, eV/Å, and eV/Å³ in Voigt's order."""
        if system_changes:
            self._last_read, self._read = self._read or self._last_read, set()
        super().calculate(atoms, properties, system_changes)
        self.results = {}
        wanted = self._last_read | self._read | set(properties)
        stress = "stress" in properties or ("stress" in wanted and bool(self.atoms.pbc.all()))
        answer = self._ask(forces="forces" in wanted, stress=stress)
        self.results = _results(answer)
        if atoms is not None and answer.uncertainty is not None:
            atoms.info.pop(OUTSIDE, None)
            for one in answer.uncertainty.outside:
                atoms.info[OUTSIDE] = one.reason

    def _ask(self, *, forces: bool, stress: bool) -> Predictions:
        reference = self.model_reference
        try:
            structure = from_atoms(self.atoms)
        except InvalidStructure as error:
            raise StructureFailure(refused(0, error)) from error
        try:
            answer = self._answer(structure, forces=forces, stress=stress)
        except ModelNotFound as error:
            if reference is None:
                raise
            raise ModelChanged(self._changed(f"it says: {error}")) from error
        except ModelChanged as error:
            raise ModelChanged(self._changed(str(error))) from error
        answer.raise_for_failures()
        assert answer.model is not None
        if reference is not None and answer.model.digest != reference.digest:
            raise ModelChanged(self._changed(f"{answer.model.pinned} answered"))
        self.model_reference = answer.model
        return answer

    def _answer(self, structure: Structure, *, forces: bool, stress: bool) -> Predictions:
        session, reference = self._session_for(structure), self.model_reference
        if session is not None:
            try:
                return session.predict(
                    structure.positions, structure.cell[None], forces=forces, stress=stress
                )
            except LimitExceeded:
                if session.model is not None:
                    raise
                # As many are open as may be; calls need none, and only cost more.
                self._leave_session()
                self._session_of, self._session_refused = structure, True
        return self._client.predict(
            structure,
            forces=forces,
            stress=stress,
            level_of_theory=self.parameters["level_of_theory"],
            model=self.parameters["model"] if reference is None else reference.pinned,
            timeout=self._timeout,
            uncertainty=self._uncertainty,
        )

    def _session_for(self, structure: Structure) -> Session | None:
        """The session of these atoms; None at their first calculation, which may be their only one."""
        before, self._session_of = self._session_of, structure
        if before is None or not _same_atoms(before, structure) or self.model_reference is None:
            self._leave_session()
            self._session_of = structure
        elif self._session is None and not self._session_refused:
            self._session = self._client.session(
                structure,
                level_of_theory=self.parameters["level_of_theory"],
                model=self.model_reference.pinned,
                timeout=self._timeout,
                uncertainty=self._uncertainty,
            )
        return self._session

    def _leave_session(self) -> None:
        session, self._session, self._session_of = self._session, None, None
        if session is not None:
            session.close()

    def _check_stress(self, atoms: Atoms) -> None:
        if not atoms.pbc.all():
            raise PropertyNotImplementedError(
                f"stress needs a structure periodic in all three directions; pbc is {atoms.pbc.tolist()}"
            )
        if self._model_has_stress is None:
            self._model_has_stress = self._client.model(self.parameters["model"]).has_stress
        if not self._model_has_stress:
            raise PropertyNotImplementedError(
                f"the model {self.parameters['model'] or 'served'} has no stress: its forces are direct"
            )

    def _changed(self, how: str) -> str:
        assert self.model_reference is not None
        return (
            f"{self._client.address} no longer serves {self.model_reference.pinned}, with which this "
            f"calculator began ({how}): serve that bundle again, or go on with a new calculator and treat "
            "what follows as another trajectory"
        )


def _results(answer: Predictions) -> dict[str, Any]:
    """What ASE keeps of an answer for one structure."""
    energy = float(answer.energy[0])
    results: dict[str, Any] = {"energy": energy, "free_energy": energy}
    if answer.forces is not None:
        results["forces"] = answer.forces
    if answer.stress is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(answer.stress[0])
    known = answer[0].uncertainty
    return results if known is None else results | known.numbers()


def _same_atoms(one: Structure, other: Structure) -> bool:
    """Whether they differ in positions and cell alone."""
    return (
        np.array_equal(one.atomic_numbers, other.atomic_numbers)
        and np.array_equal(one.pbc, other.pbc)
        and (one.charge, one.spin_multiplicity) == (other.charge, other.spin_multiplicity)
    )
