"""The loss of conservative forces without a second backward pass: the same loss, the same gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn
from torch.autograd import forward_ad

from equipot.model.batch import System, SystemBatch, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.norm import LayerNorm
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.train.dataset import Targets
from equipot.train.loss import Counts, LossModule
from equipot.train.recipe import LossSection
from equipot.train.recompute import recomputed

MakeSystems = Callable[[Sequence[Atoms]], SystemBatch]


@pytest.fixture(scope="module")
def systems() -> MakeSystems:
    def make(frames: Sequence[Atoms]) -> SystemBatch:
        graphs = [build_graph(System(a.numbers, a.positions, a.cell.array, a.pbc), 4.0) for a in frames]
        return collate(graphs, dtype=torch.float64)

    return make


def targets_for(batch: SystemBatch) -> Targets:
    """Random labels, of which some are absent."""
    generator = torch.Generator().manual_seed(5)
    n, s = batch.n_atoms, batch.n_systems
    forces = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    forces[batch.system_idx == 1] = torch.nan
    stress = torch.randn(s, 3, 3, generator=generator, dtype=torch.float64)
    stress[~batch.pbc.all(-1)] = torch.nan
    return Targets(torch.randn(s, generator=generator, dtype=torch.float64), forces, stress)


def gradients(
    batch: SystemBatch, loss: LossSection, *, two_passes: bool, checkpointed: bool = False, **config: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and its gradient by every parameter."""
    fields = {
        "width": 12,
        "layers": 2,
        "radial": 5,
        "cutoff": 4.0,
        "elements": (28, 29),
        "mean_neighbors": 9.0,
    }
    settings = ModelConfig.from_json({"levels_of_theory": ("EMT",)} | fields | config)
    torch.manual_seed(2)
    potential = Potential(settings, References(np.zeros((1, 2)), np.full(1, 1.5))).double().train()
    if checkpointed:
        potential.backbone.run_layer = recomputed
    module = LossModule(potential, loss, two_passes=two_passes)
    targets = targets_for(batch)
    value, terms = module(batch, targets, Counts(*Counts.of(targets)), 1)
    value.backward()
    assert terms.shape == (3, batch.n_systems)
    return value.detach(), {
        name: torch.zeros(()) if p.grad is None else p.grad for name, p in potential.named_parameters()
    }


@pytest.mark.parametrize("messages", ["plain", "split", "lean", "fast"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_passes_give_the_gradient_of_one(
    frames: list[Atoms], systems: MakeSystems, messages: str, checkpointed: bool
) -> None:
    batch = systems(frames[:5])
    for loss in (
        LossSection(kind="mse", stress=1.0),
        LossSection(energy=0.0),
        LossSection(forces=0.0),
        LossSection(forces=0.0, stress=3.0, kind="mae"),
    ):
        expected, by_one = gradients(batch, loss, two_passes=False, messages="plain")
        found, by_two = gradients(batch, loss, two_passes=True, messages=messages, checkpointed=checkpointed)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for name, gradient in by_one.items():
            size = float(gradient.abs().max())
            torch.testing.assert_close(by_two[name], gradient, rtol=0, atol=1e-10 * size, msg=name)


def test_two_passes_without_residual_or_norm(frames: list[Atoms], systems: MakeSystems) -> None:
    config: dict[str, Any] = {"residual": False, "normalisation": "none"}
    batch, loss = systems(frames[:4]), LossSection(stress=1.0)
    _, expected = gradients(batch, loss, two_passes=False, **config)
    _, found = gradients(batch, loss, two_passes=True, **config)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_two_passes_take_atoms_without_neighbours(systems: MakeSystems) -> None:
    batch = systems([Atoms("Cu"), Atoms("Ni")])
    expected, by_one = gradients(batch, LossSection(), two_passes=False)
    found, by_two = gradients(batch, LossSection(), two_passes=True)
    torch.testing.assert_close(found, expected)
    for name, gradient in by_one.items():
        torch.testing.assert_close(by_two[name].expand_as(gradient), gradient, msg=name)


def gradient_of_tangent(norm: nn.Module, x: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, t))).tangent  # type: ignore[no-untyped-call]
        (gradient,) = torch.autograd.grad((u * pushed).sum(), x)
    return gradient


def test_layer_norm_of_dual_numbers_can_be_differentiated() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    t, u = torch.randn_like(x), torch.randn_like(x)
    ours, theirs = LayerNorm(6).double(), nn.LayerNorm(6).double()
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(1))
    (pull,) = torch.autograd.grad(theirs(x), x, u, create_graph=True)
    (expected,) = torch.autograd.grad((t * pull).sum(), x)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    torch.testing.assert_close(gradient_of_tangent(ours, x, t, u), expected)
    # The reason for ours. Should this ever fail, torch has been mended and ours can go.
    assert (gradient_of_tangent(theirs, x, t, u) - expected).abs().max() > 1e-3
