"""What every sweep over blocks of edges does: gather, activate, sum up. Knows nothing of autograd."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from equipot.model.blocks import Block, BlockedEdges


class Inputs(NamedTuple):
    """What the message function is a function of; all in one dtype."""

    at_receiver: Tensor
    """P (N, H)"""
    at_sender: Tensor
    """Q (N, H)"""
    radial: Tensor
    """ρ (E, R)"""
    envelope: Tensor
    """e (E, 1)"""
    w_radial: Tensor
    """W_r (H, R)"""
    w_down: Tensor
    """W_2 (H, H)"""
    b_down: Tensor
    """b_2 (H,)"""


class Wanted(NamedTuple):
    """Which gradients a reverse sweep computes."""

    at_receiver: bool
    at_sender: bool
    radial: bool
    envelope: bool
    w_radial: bool
    down: bool


class Gradients(NamedTuple):
    """Gradients shaped like `Inputs`, in their dtype; None where not wanted."""

    at_receiver: Tensor | None
    at_sender: Tensor | None
    radial: Tensor | None
    envelope: Tensor | None
    w_radial: Tensor | None
    w_down: Tensor | None
    b_down: Tensor | None


def widened(x: Inputs) -> Inputs:
    """Inputs in float32 or wider, but for the second layer's.

    What is done number by number is quicker so, and exacter, than in bfloat16; what is multiplied is not.
    """
    wide = wide_dtype(x.at_receiver)
    return Inputs._make([*(t.to(wide) for t in x[:5]), x.w_down, x.b_down])


class Room:
    """Buffers (edges, H) for one block at a time, used again and again while they are in the cache."""

    def __init__(self, x: Inputs, edges: BlockedEdges) -> None:
        self._like, self._longest = x.at_receiver, edges.longest
        self._single: list[Tensor] = []
        self._double: list[Tensor] = []

    def cut(self, block: Block, count: int, *, first: int = 0) -> list[Tensor]:
        """Buffers number ``first`` to ``first + count``, one row per edge of the block."""
        while len(self._single) < first + count:
            self._single.append(self._like.new_empty(self._longest, self._like.shape[1]))
        return [buffer[: block.stop - block.start] for buffer in self._single[first : first + count]]

    def pair(self, block: Block, k: int) -> Tensor:
        """Buffer number ``k`` of two rows per edge: first all first ones, so that one product serves both."""
        while len(self._double) <= k:
            self._double.append(self._like.new_empty(2 * self._longest, self._like.shape[1]))
        return self._double[k][: 2 * (block.stop - block.start)]


class Sums:
    """The gradients while they are being summed over blocks, in float32 or wider where rows share a sum."""

    def __init__(self, x: Inputs, wanted: Wanted) -> None:
        self.at_receiver = wide_zeros(x.at_receiver) if wanted.at_receiver else None
        self.at_sender = wide_zeros(x.at_sender) if wanted.at_sender else None
        self.radial = wide_zeros(x.radial) if wanted.radial else None
        self.envelope = wide_zeros(x.envelope) if wanted.envelope else None
        self.w_radial = wide_zeros(x.w_radial) if wanted.w_radial else None
        self.w_down = wide_zeros(x.w_down) if wanted.down else None
        self.b_down = wide_zeros(x.b_down) if wanted.down else None

    def add_envelope(self, block: Block, terms: Tensor) -> None:
        """The envelope's gradient: terms (edges, H) summed over H."""
        if self.envelope is not None:
            torch.sum(terms, -1, keepdim=True, out=rows_of(self.envelope, block))

    def add_down(self, g_y: Tensor, hidden: Tensor, *, bias_rows: Tensor | None = None) -> None:
        """What y = W_2 a + b_2 adds, in the dtype of g_y; the bias may be in fewer rows, and wider."""
        if self.w_down is not None and self.b_down is not None:
            add_product(self.w_down, g_y, hidden.to(g_y.dtype))
            self.b_down.add_((g_y if bias_rows is None else bias_rows).sum(0))

    def add_first(self, x: Inputs, edges: BlockedEdges, block: Block, g_z: Tensor) -> None:
        """What z = P_i + Q_j + W_r ρ adds, from the gradient by z."""
        if self.at_receiver is not None:
            add_rows(self.at_receiver, rows_of(edges.receivers, block), g_z)
        if self.at_sender is not None:
            add_rows(self.at_sender, rows_of(edges.senders, block), g_z)
        if self.radial is not None:
            torch.mm(g_z, x.w_radial, out=rows_of(self.radial, block))
        self.add_radial_weight(g_z, rows_of(x.radial, block))

    def add_radial_weight(self, g_z: Tensor, radial: Tensor) -> None:
        """What W_r ρ adds to the gradient by W_r."""
        if self.w_radial is not None:
            add_product(self.w_radial, g_z, radial)

    def result(self, x: Inputs) -> Gradients:
        """The sums, rounded to the inputs' dtype."""
        sums = (getattr(self, name) for name in Gradients._fields)
        return Gradients(*(None if s is None else s.to(x.at_receiver.dtype) for s in sums))


def first_of(x: Inputs, edges: BlockedEdges, block: Block, out: Tensor) -> Tensor:
    """z of a block's edges, in ``out``."""
    torch.index_select(x.at_sender, 0, rows_of(edges.senders, block), out=out)
    out.add_(x.at_receiver.index_select(0, rows_of(edges.receivers, block)))
    return out.addmm_(rows_of(x.radial, block), x.w_radial.t())


def silu_and_slope(z: Tensor, value: Tensor, slope: Tensor) -> None:
    """value = silu(z), where z may be value itself, and slope = silu'(z), from one exponential."""
    torch.sigmoid(z, out=slope)
    torch.mul(z, slope, out=value)
    # With σ the sigmoid and a = zσ: silu' = σ + a(1−σ) = a + σ(1−a).
    torch.lerp(value, value.new_ones(()), slope, out=slope)


def slope_and_curve(value: Tensor, sigmoid: Tensor, slope: Tensor, curve: Tensor) -> None:
    """silu' and silu'' from silu and the sigmoid; the latter is overwritten."""
    torch.lerp(value, value.new_ones(()), sigmoid, out=slope)
    # silu'' = (1−σ)(2 silu' − silu)
    torch.sub(slope, value, alpha=0.5, out=curve)
    curve.mul_(sigmoid.sub_(1.0)).mul_(-2.0)


def rows_of(tensor: Tensor, block: Block) -> Tensor:
    """The block's rows of a tensor (E, …): a view."""
    return tensor[block.start : block.stop]


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Within it, operators keep their inputs' dtypes; tensors without numbers know no autocast."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def multiply(
    left: Tensor, weight: Tensor, out: Tensor, *, bias: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """left · weight (+ bias), multiplied in the weight's dtype; returned in that of ``out``, there or not.

    Args:
        left: rows, in either dtype.
        weight: with one row per column of ``left``.
        out: room for the result.
        bias: in the weight's dtype.
        kept: rows in the weight's dtype where the result is to stay; it is not in ``out`` then, if that is
            of the same dtype.
    """
    same = out.dtype == weight.dtype
    linear = _onednn_linear(left) if same and kept is None else None
    if linear is not None:
        return linear(left, weight.t(), bias, "none", [], "")
    target = kept if kept is not None else out if same else weight.new_empty(out.shape)
    if bias is None:
        torch.mm(left.to(weight.dtype), weight, out=target)
    else:
        torch.addmm(bias, left.to(weight.dtype), weight, out=target)
    return target if same else out.copy_(target)


def _onednn_linear(left: Tensor) -> Callable[..., Tensor] | None:
    # What torch.compile calls for a linear map. torch.mm takes another library: measured, a tenth slower at
    # width 1,024, but quicker at 256.
    if left.device.type != "cpu" or left.dtype != torch.float32 or left.shape[1] < 512:
        return None
    is_available: Callable[[], bool] = torch.backends.mkldnn.is_available
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if is_available() else None


def wide_rows(tensor: Tensor, block: Block, out: Tensor) -> Tensor:
    """The block's rows of a tensor (E, H) in the dtype of ``out``, and there if that is another."""
    rows = rows_of(tensor, block)
    return rows if rows.dtype == out.dtype else out.copy_(rows)


def per_edge(x: Inputs) -> Tensor:
    """An empty tensor (E, H)."""
    return x.at_receiver.new_empty(x.radial.shape[0], x.at_receiver.shape[1])


def wide_zeros(like: Tensor) -> Tensor:
    """Zeros of the same shape in float32 or wider."""
    # bfloat16 would lose the small terms of long sums.
    return torch.zeros_like(like, dtype=wide_dtype(like))


def wide_dtype(like: Tensor) -> torch.dtype:
    """float32, or the tensor's dtype where that is wider."""
    return torch.promote_types(like.dtype, torch.float32)


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """Adds rows to the places that index names."""
    out.index_add_(0, index, rows.to(out.dtype))


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds leftᵀ · right."""
    if out.dtype == left.dtype:
        out.addmm_(left.t(), right)
    else:
        out.add_(torch.mm(left.t(), right))
