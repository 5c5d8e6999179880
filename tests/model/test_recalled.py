"""Tensors that a backward pass computes again instead of keeping them."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from equipot.model import egnn, messages
from equipot.model.batch import Graph, collate
from equipot.model.kernels import pure_torch
from equipot.model.potential import Potential
from equipot.model.recalled import computed_again, recipe_of


def chain(x: Tensor, linear: nn.Linear, alive: list[weakref.ref[torch.UntypedStorage]]) -> Tensor:
    h = torch.tanh(x)
    origin = x.detach()
    with computed_again((h, lambda: torch.tanh(origin))):
        p = linear(h)
        rows = recipe_of(h)
        with computed_again((p, lambda: functional.linear(rows(), linear.weight, linear.bias))):
            out: Tensor = functional.silu(p)
    alive.append(weakref.ref(p.untyped_storage()))
    return out


def test_what_is_computed_again_is_not_kept_and_gives_the_same_bits() -> None:
    linear = nn.Linear(5, 5)
    x = torch.randn(7, 5, requires_grad=True)
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    out = chain(x, linear, alive)
    assert alive[0]() is None
    found = torch.autograd.grad(out.square().sum(), (x, *linear.parameters()))
    expected = torch.autograd.grad(
        functional.silu(linear(torch.tanh(x))).square().sum(), (x, *linear.parameters())
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_can_be_differentiated_again_and_again() -> None:
    linear = nn.Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x, *_: chain(x, linear, []), (x, *linear.parameters()))


def test_within_a_checkpoint_the_checkpoint_decides() -> None:
    linear = nn.Linear(5, 5)
    x = torch.randn(7, 5, requires_grad=True)
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    out = checkpoint(chain, x, linear, alive, use_reentrant=False)
    assert alive[0]() is None
    found = torch.autograd.grad(out.sum(), (x, linear.weight))
    expected = torch.autograd.grad(chain(x, linear, []).sum(), (x, linear.weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
def test_lean_training_has_the_bits_it_has_when_it_forgets_nothing(
    make_model: Callable[..., Potential],
    structures: dict[str, list[Graph]],
    monkeypatch: pytest.MonkeyPatch,
    autocast: bool,
    compiled: bool,
) -> None:
    model = make_model(dtype=torch.float32, forces="direct", messages="lean").train()
    batch = collate(structures["mixed"], dtype=torch.float32)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = model(batch)
        assert prediction.forces is not None
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def run() -> list[Tensor]:
        if compiled:
            return gradients()
        with pure_torch():
            return gradients()

    forgetting = run()
    for module in (egnn, messages):
        monkeypatch.setattr(module, "stays", lambda _: False)
    keeping = run()
    assert forgetting
    assert all(torch.equal(a, b) for a, b in zip(forgetting, keeping, strict=True))
