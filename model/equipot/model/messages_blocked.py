"""The message function as autograd sees it: two Functions around the sweeps. Knows nothing of modules.

`sum_messages` can be differentiated once by everything, and twice where the first time was by h, the radial
basis and the envelope alone, as conservative forces are. For the second time the work is put off. The first
backward pass, under ``create_graph``, runs `_Pull`; the final one reaches `_Pull` first, which hands on a
derivative and leaves the direction it was given in a `Stash`; when it reaches `_Messages`, one sweep serves
both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from equipot.model.block_work import Inputs, Wanted, without_autocast
from equipot.model.blocks import BlockedEdges
from equipot.model.kernels import Sweeps, sweeps_for
from equipot.model.message_sweeps import Direction
from equipot.model.stash import REMEDY, Stash, is_wanted

T = TypeVar("T")


class _Deferred(NamedTuple):
    """What the final sweep needs of one first backward pass."""

    g_push: Tensor
    direction: Direction
    t_y_kept: Tensor | None
    g_hidden_kept: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What belongs to one call and is no tensor to differentiate by."""

    edges: BlockedEdges
    keep: int
    pulled_once: bool
    stash: Stash[_Deferred]
    sweeps: Sweeps


class _Context(FunctionCtx):
    """What autograd gives a Function, and what ours leave in it."""

    job: _Job
    save_for_backward: Callable[..., None]
    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]
    next_functions: tuple[tuple[Any, int], ...]


def sum_messages(
    x: Inputs, edges: BlockedEdges, *, keep: Literal[0, 1, 3], pulled_once: bool = False
) -> Tensor:
    """Σ_j m_ij (N, H) in float32 or wider.

    Args:
        x: the function's inputs, all in one dtype.
        edges: its edges.
        keep: how many edge tensors (E, H) to keep between the passes, each for a matrix product less per
            pass that needs it. First derivatives alone have use for one.
        pulled_once: whether gradients by ρ and e are wanted of passes under create_graph alone; others then
            leave them out.

    Raises:
        RuntimeError: in a backward pass that asks for what is not provided: third derivatives, second ones
            where the first were by parameters, or a pass after one that ended halfway.
    """
    job = _Job(edges, keep, pulled_once, Stash(), sweeps_for(x))
    out: Tensor = _Messages.apply(job, *x)[0]  # type: ignore[no-untyped-call]
    return out


class _Messages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, job: _Job, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        x = Inputs(*tensors)
        ctx.set_materialize_grads(False)
        ctx.job = job
        out, y = _without_autocast(x, lambda: job.sweeps.forward(x, job.edges, keep=job.keep > 0))
        # An output without numbers: `_Pull` takes it as an input, so autograd runs `_Pull` before this node.
        link = out.new_empty(0)
        ctx.save_for_backward(*x, y, link)
        return out, link

    @staticmethod
    def backward(ctx: _Context, g_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, y, link = ctx.saved_tensors
        edges = zip(ctx.needs_input_grad[1:], ctx.next_functions, strict=True)
        wanted = [is_wanted(needed, edge) for needed, edge in edges]
        if not torch.is_grad_enabled():
            x = Inputs(*tensors)
            by = Wanted._make([*wanted[:5], any(wanted[5:])])
            if ctx.job.pulled_once:
                by = by._replace(radial=False, envelope=False)
            return (None, *_without_autocast(x, lambda: _sum_up(ctx.job, x, y, g_out, by)))
        if any(wanted[4:]):
            raise RuntimeError(
                "messages: gradients of parameters cannot be differentiated again, and create_graph=True "
                f"asked for that; {REMEDY}"
            )
        if g_out is None:
            return (None,) * 8
        x = Inputs(*(tensor.detach() for tensor in tensors))
        first = _Pull.apply(ctx.job, wanted[:4], g_out, link, y, *x)  # type: ignore[no-untyped-call]
        return (None, *first, None, None, None)


class _Pull(torch.autograd.Function):
    """Gradients of ⟨G, S⟩ by P, Q, ρ and e as a function of G; `_Messages` answers for the rest."""

    @staticmethod
    def forward(
        ctx: _Context,
        job: _Job,
        wanted: list[bool],
        g_out: Tensor,
        link: Tensor,
        y: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x = Inputs(*tensors)
        ctx.set_materialize_grads(False)
        ctx.job = job
        by = Wanted._make([*wanted, False, False])
        grads, g_hidden = _without_autocast(
            x, lambda: job.sweeps.reverse(x, job.edges, g_out, by, y_kept=y, keep=job.keep > 1)
        )
        ctx.save_for_backward(g_out, g_hidden, y, *x)
        return grads[:4]

    @staticmethod
    def backward(ctx: _Context, *t: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"messages: third derivatives are not provided; {REMEDY}")
        g_push, g_hidden, y, *tensors = ctx.saved_tensors
        x, direction, job = Inputs(*tensors), Direction(*t), ctx.job
        pushed, t_y = _without_autocast(
            x, lambda: job.sweeps.push(x, job.edges, direction, y_kept=y, keep=job.keep > 1)
        )
        job.stash.put(_Deferred(g_push, direction, t_y, g_hidden))
        return (None, None, pushed.to(g_push.dtype), *(None,) * 9)


def _sum_up(
    job: _Job, x: Inputs, y: Tensor | None, g_out: Tensor | None, wanted: Wanted
) -> list[Tensor | None]:
    total: list[Tensor | None] = [None] * len(x)
    for entry in job.stash.take():
        more = job.sweeps.reverse_push(
            x,
            job.edges,
            g_out,
            entry.g_push,
            entry.direction,
            wanted,
            y_kept=y,
            t_y_kept=entry.t_y_kept,
            g_hidden_kept=entry.g_hidden_kept,
        )
        total = [_add(a, b) for a, b in zip(total, more, strict=True)]
        g_out = None
    if g_out is not None:
        more, _ = job.sweeps.reverse(x, job.edges, g_out, wanted, y_kept=y)
        total = [_add(a, b) for a, b in zip(total, more, strict=True)]
    return total


def _without_autocast(x: Inputs, sweep: Callable[[], T]) -> T:
    # Inputs have one dtype already, and autocast would put copies in the place of the sweeps' buffers.
    with without_autocast(x.at_receiver):
        return sweep()


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
