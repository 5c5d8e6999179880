"""A MACE model file, structures together. Runs in the calculator's process; the only room of mace."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ase import Atoms
from mace import data
from mace.tools import AtomicNumberTable, torch_geometric

from equipot.serve.foreign.files import sha256
from equipot.serve.foreign.words import Answered, Facts, Refused, Structure, answered


class MaceBackend:
    """One model in memory, in the dtype it was stored in."""

    def __init__(self, model: Any, path: str, device: str, head: str) -> None:  # noqa: ANN401
        self._model = model
        self._path = path
        self._device = device
        self._heads = list(getattr(model, "heads", None) or ["Default"])
        self._head = head or self._heads[-1]
        if self._head not in self._heads:
            raise ValueError(f"head {head!r} is not in the model; it has {', '.join(self._heads)}")
        self._table = AtomicNumberTable([int(number) for number in model.atomic_numbers])
        self._dtype = next(model.parameters()).dtype
        # MACE makes its tensors in torch's default dtype; this process computes nothing else.
        torch.set_default_dtype(self._dtype)

    def facts(self) -> Facts:
        """What it says of itself."""
        return Facts(
            elements=tuple(sorted(self._table.zs)),
            cutoff=float(self._model.r_max),
            level_of_theory="",
            has_forces=True,
            has_stress=True,
            conservative=True,
            dtype=str(self._dtype).removeprefix("torch."),
            n_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            charge="refuse",
            batched=True,
            versions={"mace-torch": importlib.metadata.version("mace-torch")},
            weights={"model": sha256(self._path), "head": self._head},
        )

    def compute(self, structures: list[Structure], *, forces: bool, stress: bool) -> list[Answered | Refused]:
        """Answers in order."""
        batch = torch_geometric.Batch.from_data_list([self._graph(one) for one in structures])
        out = self._model(
            batch.to(self._device).to_dict(), compute_force=forces or stress, compute_stress=stress
        )
        energies = out["energy"].detach().cpu().numpy()
        all_forces = out["forces"].detach().cpu().numpy() if forces else None
        all_stress = out["stress"].detach().cpu().numpy() if stress else None
        answers: list[Answered | Refused] = []
        start = 0
        for index, structure in enumerate(structures):
            stop = start + len(structure.numbers)
            tensor = None
            if all_stress is not None:
                tensor = all_stress[index] if all(structure.pbc) else np.full((3, 3), np.nan)
            answers.append(
                answered(energies[index], None if all_forces is None else all_forces[start:stop], tensor)
            )
            start = stop
        return answers

    def _graph(self, structure: Structure) -> Any:  # noqa: ANN401
        atoms = Atoms(structure.numbers, structure.places, cell=structure.lattice, pbc=structure.pbc)
        config = data.config_from_atoms(atoms, head_name=self._head)
        return data.AtomicData.from_config(
            config, z_table=self._table, cutoff=float(self._model.r_max), heads=self._heads
        )


def build(target: str, arguments: Mapping[str, Any], charge: str, device: str) -> MaceBackend:
    """Loads a model file, which is a pickle and so a program: only one that you trust.

    Args:
        target: the file.
        arguments: `head` of a model with several.
        charge: not used.
        device: as torch names it.

    Raises:
        TypeError: unknown arguments.
    """
    if unknown := sorted(set(arguments) - {"head"}):
        raise TypeError(f"unknown argument {unknown[0]!r}; known is head")
    model = torch.load(target, map_location=device, weights_only=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return MaceBackend(model.eval(), target, device, str(arguments.get("head", "")))
