"""A linear map whose weight's second share is put off has the derivatives of torch's own."""

import pytest
import torch
from torch import Tensor

from equipot.model.node_linear import NodeLinear

RTOL = 1e-10


def make(n_atoms: int, *, bias: bool) -> tuple[NodeLinear, NodeLinear, Tensor]:
    torch.manual_seed(n_atoms)
    first, second = NodeLinear(6, 8, bias=bias).double(), NodeLinear(8, 6, bias=bias).double()
    return first, second, torch.randn(n_atoms, 6, dtype=torch.float64, requires_grad=True)


def pulled(first: NodeLinear, second: NodeLinear, x: Tensor, *, put_off: bool) -> tuple[Tensor, Tensor]:
    """An energy of two maps, and its gradient by x, to be differentiated again."""
    energy = second(torch.sin(first(x, put_off)), put_off).sin().sum()
    (pull,) = torch.autograd.grad(energy, x, create_graph=True)
    return energy, pull


def gradients(first: NodeLinear, second: NodeLinear, x: Tensor, *, put_off: bool) -> list[Tensor]:
    energy, pull = pulled(first, second, x, put_off=put_off)
    wanted = [p for p in (x, *first.parameters(), *second.parameters()) if p.requires_grad]
    found = torch.autograd.grad(energy.square() + pull.square().sum(), wanted, retain_graph=True)
    # A second pass over the same graph finds nothing of the first.
    again = torch.autograd.grad(pull.cos().sum(), wanted, allow_unused=True, materialize_grads=True)
    return [energy, pull, *found, *again]


def assert_same(expected: list[Tensor], found: list[Tensor]) -> None:
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0.0, atol=RTOL * float(a.detach().abs().max()))


# Fewer atoms than columns: the factors wait; more of them: their product does.
@pytest.mark.parametrize("n_atoms", [1, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives_are_those_of_torch(n_atoms: int, bias: bool) -> None:
    maps = make(n_atoms, bias=bias)
    assert_same(gradients(*maps, put_off=False), gradients(*maps, put_off=True))


def test_a_frozen_weight_is_left_alone() -> None:
    first, second, x = make(5, bias=True)
    second.weight.requires_grad_(False)
    assert_same(gradients(first, second, x, put_off=False), gradients(first, second, x, put_off=True))


def test_weights_may_be_differentiated_under_create_graph() -> None:
    first, second, x = make(5, bias=True)

    def penalty(put_off: bool) -> list[Tensor]:
        energy = second(torch.sin(first(x, put_off)), put_off).sin().sum()
        by_weight, by_bias = torch.autograd.grad(energy, (first.weight, first.bias), create_graph=True)
        return list(torch.autograd.grad(by_weight.square().sum() + by_bias.sum(), (x, first.weight)))

    assert_same(penalty(put_off=False), penalty(put_off=True))


def test_a_share_left_behind_is_never_added_to_another_pass() -> None:
    first, _, x = make(5, bias=True)
    out = first(x, True)
    g = torch.ones_like(out, requires_grad=True)
    (pull,) = torch.autograd.grad(out, x, g, create_graph=True)
    # This pass ends at g, before the map whose weight's gradient it would have to complete.
    torch.autograd.grad(pull.square().sum(), g, retain_graph=True)
    with pytest.raises(RuntimeError, match="ended before"):
        torch.autograd.grad(out.sum(), first.weight)
