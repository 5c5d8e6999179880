"""Dual numbers, a value and its tangent: `torch.autograd.forward_ad` with types."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def parts_of(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor's value, and its tangent if it has one at the present dual level."""
    value, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return value, tangent


def dual(value: Tensor, tangent: Tensor | None) -> Tensor:
    """A value with a tangent of its shape; without one, the value itself. Needs a dual level."""
    if tangent is None:
        return value
    made: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return made


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor is a dual number; never in a graph that torch.compile traces."""
    return not torch.compiler.is_compiling() and parts_of(tensor)[1] is not None
