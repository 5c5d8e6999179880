"""CHGNet, structures together. Runs in the calculator's process; the only room of chgnet and pymatgen."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch
from chgnet.model.model import CHGNet
from pymatgen.core import Lattice
from pymatgen.core import Structure as Crystal

from equipot.serve.foreign.words import Answered, Facts, Refused, Structure, answered

BATCH = 64
"""Structures that CHGNet sees at once."""

GPA = 1.0 / 160.21766208
"""eV/Å³, as CHGNet's own calculator converts its stress."""

LEVEL = "PBE/PBE+U with MP2020 corrections (MPtrj)"
"""Of the weights in the wheel: those of the Materials Project's corrected energies."""


class ChgnetBackend:
    """The weights of the wheel, or of a name that `CHGNet.load` knows."""

    def __init__(self, model: Any, device: str) -> None:  # noqa: ANN401  # chgnet has no types
        self._model = model
        self._device = device
        self._converter = model.graph_converter

    def facts(self) -> Facts:
        """What it says of itself."""
        weights = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            weights.update(name.encode())
            weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return Facts(
            elements=tuple(range(1, 95)),
            cutoff=float(self._converter.atom_graph_cutoff),
            level_of_theory=LEVEL,
            has_forces=True,
            has_stress=True,
            conservative=True,
            dtype="float32",
            n_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            charge="refuse",
            batched=True,
            versions={"chgnet": importlib.metadata.version("chgnet")},
            weights={"state": weights.hexdigest()},
        )

    def compute(self, structures: list[Structure], *, forces: bool, stress: bool) -> list[Answered | Refused]:
        """Answers in order; what CHGNet cannot see is refused, the rest is computed together."""
        graphs = [self._graph(structure) for structure in structures]
        good = [graph for graph in graphs if not isinstance(graph, Refused)]
        task = "efs" if stress else "ef" if forces else "e"
        found = self._model.predict_graph(good, task=task, batch_size=BATCH) if good else []
        # Of a list of one it gives the one.
        predicted = iter([found] if isinstance(found, dict) else found)
        return [
            graph if isinstance(graph, Refused) else _answer(next(predicted), structure, forces, stress)
            for graph, structure in zip(graphs, structures, strict=True)
        ]

    def _graph(self, structure: Structure) -> Any:  # noqa: ANN401
        if not all(structure.pbc):
            return Refused(
                "unsupported", "CHGNet knows crystals alone: give a cell and pbc in all three directions"
            )
        crystal = Crystal(
            Lattice(structure.lattice), structure.numbers, structure.places, coords_are_cartesian=True
        )
        try:
            return self._converter(crystal).to(self._device)
        except ValueError as error:
            # An atom without neighbours, most likely.
            return Refused("unsupported", " ".join(str(error).split())[:400])


def build(target: str, arguments: Mapping[str, Any], charge: str, device: str) -> ChgnetBackend:
    """Loads CHGNet; `arguments` are those of `CHGNet.load`, and the others say nothing here."""
    model = CHGNet.load(use_device=device, verbose=False, **arguments)
    model.eval()
    torch.set_grad_enabled(True)
    return ChgnetBackend(model, device)


def _answer(predicted: Mapping[str, Any], structure: Structure, forces: bool, stress: bool) -> Answered:
    # CHGNet gives energies per atom.
    energy = float(predicted["e"]) * len(structure.numbers)
    return answered(energy, predicted["f"] if forces else None, predicted["s"] * GPA if stress else None)
