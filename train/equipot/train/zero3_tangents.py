"""Lets dual numbers through what ZeRO-3 puts into a module, so that it can be differentiated forwards.

ZeRO-3 sets two marks around every module, identities that fetch weights before a backward pass and release
them after it, and has a linear map of its own, which keeps no weights alive. None of them knows forward
derivatives. Here each gets one: the tangent goes the value's way, through a mark or map of its own, so that
the weights are there for the tangent's backward pass, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

Function = type[torch.autograd.Function]


class _Context(Protocol):
    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_forward(self, *tensors: torch.Tensor | None) -> None: ...


def let_tangents_through(module: nn.Module, linear: Function) -> None:
    """Teach forward derivatives to a module that DeepSpeed has taken over.

    Args:
        module: with the marks ``pre_bwd_fn`` and ``post_bwd_fn`` on each of its parts.
        linear: the Function by which ZeRO-3 computes linear maps (input, weight, bias).
    """
    for part in module.modules():
        marks: tuple[Any, Any] = part.pre_bwd_fn, part.post_bwd_fn
        for mark in marks:
            mark.jvp = staticmethod(partial(_through_mark, mark))
    if linear.jvp is torch.autograd.Function.jvp:
        linear.setup_context = staticmethod(  # type: ignore[method-assign]
            partial(_keep_weight, linear.setup_context)
        )
        linear.jvp = staticmethod(partial(_through_linear, linear))  # type: ignore[method-assign]


def _through_mark(mark: Function, context: _Context, tangent: torch.Tensor) -> torch.Tensor:
    marked: torch.Tensor = mark.apply(tangent)  # type: ignore[no-untyped-call]
    return marked


def _keep_weight(
    setup: Callable[..., None],
    context: _Context,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> None:
    setup(context, inputs, output)
    context.save_for_forward(inputs[1])


def _through_linear(
    linear: Function, context: _Context, tangent: torch.Tensor, *by_parameters: torch.Tensor | None
) -> torch.Tensor:
    (weight,) = context.saved_tensors
    pushed: torch.Tensor = linear.apply(tangent, weight)  # type: ignore[no-untyped-call]
    return pushed
