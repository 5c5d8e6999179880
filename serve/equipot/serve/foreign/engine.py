"""An `Engine` that computes with somebody else's potential in a process of its own. Knows no gRPC."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from equipot.model.batch import Graph, System
from equipot.model.card import canonical_json
from equipot.model.elements import symbol
from equipot.model.errors import StructureError
from equipot.model.skin import SkinnedNeighbors
from equipot.model.uncertainty import Uncertainty
from equipot.serve.card import ForceMode, ModelCard
from equipot.serve.config import RequestLimits
from equipot.serve.engine import Result, not_finite
from equipot.serve.errors import Fault, ServeError
from equipot.serve.foreign.process import CalculatorProcess
from equipot.serve.foreign.spec import COST_CUTOFF, CalculatorSpec
from equipot.serve.foreign.words import Answered, Facts, Refused, Structure
from equipot.serve.preparation import Preparation

MEAN_NEIGHBORS = 30.0
"""Of an atom within some 5 Å, until its edges are counted."""

REMEDIES = {
    "unsupported": "ask a potential that knows this",
    "invalid_structure": "check its geometry",
    "internal": "the server's log has more; check its geometry, or send it by itself",
}


class ForeignEngine:
    """One foreign potential; see `Engine`."""

    def __init__(
        self, spec: CalculatorSpec, *, device: str, limits: RequestLimits, threads: int | None = None
    ) -> None:
        """Starts the calculator's process.

        Args:
            spec: which one.
            device: as torch names it.
            limits: of one structure.
            threads: that it may compute with; None is as many as it takes.

        Raises:
            ServeError: it cannot be made, or its level of theory must be named.
        """
        if spec.file is not None and not spec.file.is_file():
            raise ServeError(f"calculator {spec.calculator}: there is no file {spec.file}")
        self._process = CalculatorProcess(spec, device=device, threads=threads)
        facts = self._process.facts
        try:
            self.card = _card(spec, facts)
        except ServeError:
            self._process.close()
            raise
        self.dtype = facts.dtype
        self.at_once = False
        # Nobody knows how long made-up atoms take somebody else's code.
        self.measurable = False
        self.uncertainty = Uncertainty()
        self.exhausted: tuple[int, int] | None = None
        self.tensor_parallel = 1
        self.batch_invariant = False
        self.way = f"{spec.kind}, {'together' if facts.batched else 'one by one'}, in its own process"
        self._prepare = Preparation(
            cutoff=self.card.cutoff or COST_CUTOFF, limits=limits, supported=self._supported
        )

    def prepare(
        self, systems: Sequence[System], *, neighbors: Sequence[SkinnedNeighbors] | None = None
    ) -> list[Graph | Fault]:
        """Checks structures and counts their pairs, by which the queue goes; the calculator finds its own."""
        return self._prepare(systems, neighbors)

    def compute(self, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> list[Result | Fault]:
        """Answers a batch; a structure at which the calculator fails is refused alone.

        Raises:
            NotReady: the calculator died, and does not start again.
        """
        structures = [_structure(graph.system) for graph in graphs]
        answers = self._process.compute(structures, forces=forces, stress=stress)
        return [_result(answer, graph) for answer, graph in zip(answers, graphs, strict=True)]

    def check_ready(self) -> None:
        """Raises NotReady while the calculator does not start."""
        self._process.check_ready()

    def close(self) -> None:
        """Ends the calculator's process."""
        self._process.close()

    def _supported(self, system: System) -> System:
        card = self.card
        if card.elements:
            unknown = np.flatnonzero(~np.isin(system.atomic_numbers, card.elements))
            if len(unknown):
                raise StructureError(
                    field="atomic_numbers",
                    message=f"atom {unknown[0]} is {symbol(int(system.atomic_numbers[unknown[0]]))}, which"
                    f" {card.name} does not know",
                    remedy="ask a potential that knows this element",
                    reason="unsupported",
                )
        for field, value, known in (
            ("charge", system.charge, card.charges),
            ("spin_multiplicity", system.spin_multiplicity, card.spin_multiplicities),
        ):
            if known and value not in known:
                raise StructureError(
                    field=field,
                    message=f"is {value}, of which {card.name} is not told: it would be as if it were 0",
                    remedy="leave it out, or ask a potential that takes it",
                    reason="unsupported",
                )
        return system


def _card(spec: CalculatorSpec, facts: Facts) -> ModelCard:
    level = spec.level_of_theory or facts.level_of_theory
    if not level:
        raise ServeError(
            f"calculator {spec.calculator}: say at which level of theory its energies are (--level-of-theory,"
            " or level_of_theory in its .toml file): energies of different levels are never compared"
        )
    decides = {
        "format": "foreign-potential",
        "kind": spec.kind,
        # Where a file lies decides nothing; its sum is among the weights.
        "factory": spec.target.rpartition("/")[2] if spec.kind == "ase" else "",
        "arguments": dict(spec.arguments),
        "level_of_theory": level,
        "charge": facts.charge,
        "versions": facts.versions,
        "weights": facts.weights,
    }
    digest = "sha256:" + hashlib.sha256(canonical_json(decides).encode()).hexdigest()
    elements = spec.atomic_numbers or facts.elements
    told = facts.charge != "refuse"
    force_mode: ForceMode = "none"
    if facts.has_forces:
        force_mode = "conservative" if facts.conservative else "unknown"
    cutoff = spec.cutoff or facts.cutoff
    text = {**decides, "name": spec.shown_name, "elements": elements, "cutoff": cutoff, "digest": digest}
    return ModelCard(
        name=spec.shown_name,
        digest=digest,
        levels_of_theory=(level,),
        elements=elements,
        charges=() if told else (0,),
        spin_multiplicities=() if told else (0,),
        cutoff=cutoff,
        mean_neighbors=MEAN_NEIGHBORS,
        force_mode=force_mode,
        has_stress=facts.has_stress,
        dtype=facts.dtype,
        n_parameters=facts.n_parameters,
        text=json.dumps(text, sort_keys=True, indent=1, ensure_ascii=False),
    )


def _structure(system: System) -> Structure:
    return Structure(
        np.ascontiguousarray(system.atomic_numbers, dtype=np.int64).tobytes(),
        np.ascontiguousarray(system.positions, dtype=np.float64).tobytes(),
        np.ascontiguousarray(system.cell, dtype=np.float64).tobytes(),
        (bool(system.pbc[0]), bool(system.pbc[1]), bool(system.pbc[2])),
        system.charge,
        system.spin_multiplicity,
    )


def _result(answer: Answered | Refused, graph: Graph) -> Result | Fault:
    if isinstance(answer, Refused):
        return Fault(answer.reason, "", answer.message, REMEDIES[answer.reason])
    n_atoms = graph.n_atoms
    try:
        result = Result(
            answer.energy,
            np.frombuffer(answer.forces).reshape(n_atoms, 3) if answer.forces else None,
            np.frombuffer(answer.stress).reshape(3, 3) if answer.stress else None,
        )
    except ValueError:
        return Fault("internal", "", "the calculator's arrays have a wrong shape", REMEDIES["internal"])
    return not_finite(result, graph) or result
