"""A linear map of atoms' features that holds no weight-sized tensors while forces are differentiated.

Where a gradient is differentiated again, a weight gets two shares of its gradient: one from the derivative of
the first backward pass, one from the forward pass. Autograd computes the first early and keeps it until the
second is there, for all layers at once: with few atoms and a large width that is most of a step's memory.
Here the two factors of the first share wait instead, unless they are larger than it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from equipot.model.stash import REMEDY, Stash, is_wanted


class NodeLinear(nn.Linear):
    """torch's own, with another order of evaluation where the caller asks for it."""

    def forward(self, input: Tensor, put_off: bool = False) -> Tensor:
        """(N, out) from (N, in).

        Args:
            input: (N, in).
            put_off: whether the weight's gradient by way of a first backward pass is to be put off.
        """
        # Autocast would have to be done by hand, for a dtype whose weights are half as large.
        autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)
        if not put_off or autocast:
            return super().forward(input)
        job = _Job(self.weight.requires_grad, Stash())
        out: Tensor = _Linear.apply(job, input, self.weight, self.bias)[0]  # type: ignore[no-untyped-call]
        return out


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What belongs to one call."""

    trains: bool
    stash: Stash[tuple[Tensor, Tensor | None]]


class _Context(FunctionCtx):
    """What autograd gives a Function, and what ours leave in it."""

    job: _Job
    save_for_backward: Callable[..., None]
    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]
    next_functions: tuple[tuple[Any, int], ...]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, job: _Job, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.job = job
        out = functional.linear(x, weight, bias)
        # An output without numbers: `_Pull` takes it as an input, so autograd runs `_Pull` before this node.
        link = out.new_empty(0)
        ctx.save_for_backward(x, weight, link)
        return out, link

    @staticmethod
    def backward(ctx: _Context, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, link = ctx.saved_tensors
        # There is no edge for a bias that is None.
        edges = zip(ctx.needs_input_grad[1:], ctx.next_functions, strict=False)
        by_x, by_weight, by_bias = (*(is_wanted(needed, edge) for needed, edge in edges), False)[:3]
        if torch.is_grad_enabled():
            if g is None:
                return (None,) * 4
            first = _Pull.apply(ctx.job, g, link, weight.detach()) if by_x else None  # type: ignore[no-untyped-call]
            return None, first, g.t() @ x if by_weight else None, g.sum(0) if by_bias else None
        g_weight = g.t() @ x if by_weight and g is not None else None
        for left, right in ctx.job.stash.take():
            if not by_weight:
                continue
            if g_weight is None:
                g_weight = left if right is None else left.t() @ right
            elif right is None:
                g_weight.add_(left)
            else:
                g_weight.addmm_(left.t(), right)
        if g is None:
            return None, None, g_weight, None
        return None, g @ weight if by_x else None, g_weight, g.sum(0) if by_bias else None


class _Pull(torch.autograd.Function):
    """G W as a function of G; `_Linear` answers for W."""

    @staticmethod
    def forward(ctx: _Context, job: _Job, g: Tensor, link: Tensor, weight: Tensor) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(g, weight)
        return g @ weight

    @staticmethod
    def backward(ctx: _Context, t: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"messages: third derivatives are not provided; {REMEDY}")
        g, weight = ctx.saved_tensors
        if ctx.job.trains:
            few = len(t) < len(weight)
            ctx.job.stash.put((g, t) if few else (g.t() @ t, None))
        return None, t @ weight.t(), None, None
