"""How alike the atoms of a structure become from layer to layer: over-smoothing, as a number."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipot.model.backbone import RunLayer
from equipot.model.batch import SystemBatch
from equipot.model.geometry import Edges, sum_by_index
from equipot.model.potential import Potential


@torch.no_grad()
def similarity_by_layer(potential: Potential, batches: Iterable[SystemBatch]) -> list[float]:
    """Mean cosine similarity of two atoms' features, the embedding first, then after each layer.

    1 is a structure whose atoms cannot be told apart. The mean is over pairs of different atoms of a
    structure, then over structures; atoms alone are left out. Works with any backbone that calls its layers
    through ``run_layer``; activation checkpointing is off meanwhile.

    Args:
        potential: is put in eval mode.
        batches: in the dtype of the potential; at least one structure has two atoms.

    Returns:
        layers + 1 numbers in [−1, 1].
    """
    sums: list[float] = []
    structures = 0
    before, mode = potential.backbone.run_layer, potential.training
    potential.eval()
    try:
        for batch in batches:
            found: list[float] = []
            potential.backbone.run_layer = _recorder(found, batch)
            potential(batch, forces=False)
            counts = torch.bincount(batch.system_idx, minlength=batch.n_systems)
            sums = [a + b for a, b in zip(sums or [0.0] * len(found), found, strict=True)]
            structures += int((counts > 1).sum())
    finally:
        potential.backbone.run_layer = before
        potential.train(mode)
    return [total / structures for total in sums]


def _recorder(found: list[float], batch: SystemBatch) -> RunLayer:
    """Calls layers, and notes the similarity in each one's output, and in the first one's input."""

    def run(layer: nn.Module, h: Tensor, edges: Edges) -> Tensor:
        system_idx = batch.system_idx if edges.slots is None else batch.system_idx[edges.slots.order]
        if not found:
            found.append(_similarity(h, system_idx, batch.n_systems))
        out: Tensor = layer(h, edges)
        found.append(_similarity(out, system_idx, batch.n_systems))
        return out

    return run


def _similarity(features: Tensor, system_idx: Tensor, n_systems: int) -> float:
    """Sum over structures of the mean cosine of pairs of atoms: of |Σ ĥ|² less the atoms with themselves."""
    units = functional.normalize(features.double(), dim=-1)
    counts = torch.bincount(system_idx, minlength=n_systems).double()
    together = sum_by_index(units, system_idx, n_systems).square().sum(-1)
    alone = sum_by_index(units.square().sum(-1), system_idx, n_systems)
    pairs = counts * (counts - 1.0)
    return float(((together - alone)[pairs > 0] / pairs[pairs > 0]).sum())
