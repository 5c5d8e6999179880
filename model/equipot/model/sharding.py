"""Spreads one potential over the ranks of a group, by width. Knows no processes and no transport.

Of the weights of the layers and heads every rank holds a slice. What crosses ranks is (atoms, width), never
(edges, width): with z_ij the first pre-activation of a message (whole on every rank, its two products on
atoms gathered from slices), a rank computes its own columns of W_2 silu(z_ij), so of every message and of
its sum. On the way back each rank has a part of ∂E/∂z_ij; as everything below is linear, the parts go on as
they are, and only sums over edges are added up. Per layer that is, forward, two gathers and one sum, and as
much backward. DeepSpeed's automatic splitting makes row-parallel products of any linear map, so it would
add up W_2 silu(z_ij) itself, tens of times as large.

What crosses may be differentiated any number of times: the way back of each crossing is another crossing.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from equipot.model.config import ModelConfig
from equipot.model.egnn import EGNN, EGNNLayer
from equipot.model.errors import ModelError
from equipot.model.potential import Potential, Prediction

Kind = Literal["rows", "columns", "first", "whole"]
"""What a rank holds of a parameter: rows or columns of its own; all, on the first rank alone; all."""

Change = Callable[[Tensor, "Group"], Tensor]

Way = Literal["enter", "sum", "gather", "sum_slice"]
"""How values cross between ranks."""

_BACK: Mapping[Way, Way] = {"enter": "sum", "sum": "enter", "gather": "sum_slice", "sum_slice": "gather"}

# First match decides. `down` of a layer adds up what the ranks have, so its bias may come from one alone.
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"backbone\.layers\.\d+\.messages\.up\.(receiver|sender)\.(weight|bias)", "rows"),
    (r"backbone\.layers\.\d+\.messages\.down\.(weight|bias)", "rows"),
    (r"backbone\.layers\.\d+\.(own|gathered)\.(weight|bias)", "rows"),
    (r"backbone\.layers\.\d+\.down\.weight", "columns"),
    (r"backbone\.layers\.\d+\.down\.bias", "first"),
    (r"(energy|force)_head\.up\..*", "rows"),
    (r"(energy|force)_head\.down\.weight", "columns"),
)


class Group(Protocol):
    """The ranks that share one potential, and how numbers cross between them."""

    rank: int
    size: int

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, the same bits on every rank; a new tensor."""

    def gather(self, values: Tensor) -> Tensor:
        """All ranks' values (…, n) side by side: (…, size · n)."""

    def sum_slice(self, values: Tensor) -> Tensor:
        """This rank's columns (…, n) of the sum of all ranks' values (…, size · n)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of one parameter that a rank holds: `start` to `stop` along `dim`; all if `dim` is None.

    `zero` says that the rank holds zeros in the parameter's place.
    """

    dim: int | None = None
    start: int = 0
    stop: int = 0
    zero: bool = False


def cut_of(name: str, shape: tuple[int, ...], rank: int, size: int) -> Cut:
    """What a rank holds of a parameter of a potential's state dict."""
    kind = next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, name)), "whole")
    if kind == "whole" or size == 1:
        return Cut()
    if kind == "first":
        return Cut(zero=rank > 0)
    dim = 1 if kind == "columns" else 0
    part = shape[dim] // size
    return Cut(dim, rank * part, (rank + 1) * part)


def check_divisible(config: ModelConfig, size: int) -> None:
    """Raises ModelError unless the width can be split so many ways."""
    if config.architecture != "egnn":
        raise ModelError(f"architecture {config.architecture!r} cannot be split over ranks; serve it with 1")
    if size < 1 or config.width % (2 * size):
        fitting = [n for n in range(1, 65) if config.width % (2 * n) == 0]
        raise ModelError(
            f"width {config.width} cannot be split over {size} ranks evenly, heads included; "
            f"choose one of {', '.join(map(str, fitting))}"
        )


def parallel_config(config: ModelConfig) -> ModelConfig:
    """The config whose evaluation can be split: the same function of the same parameters.

    The forms of the messages that work by blocks take square weights.
    """
    return replace(config, messages="split")


def spread(potential: Potential, group: Group) -> None:
    """Makes a potential this rank's part of itself; its parameters are cut and keep their names.

    Every rank must then be called with the same batches, in the same order, and gets the whole prediction.

    Args:
        potential: with all its parameters, or on the meta device; its config is a `parallel_config`.
        group: the ranks.

    Raises:
        ModelError: the width does not divide.
    """
    check_divisible(potential.config, group.size)
    if group.size == 1:
        return
    for module_name, module in potential.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            cut = cut_of(f"{module_name}.{name}", tuple(parameter.shape), group.rank, group.size)
            own = nn.Parameter(_apply(cut, parameter.detach()), requires_grad=parameter.requires_grad)
            setattr(module, name, own)
    backbone = potential.backbone
    assert isinstance(backbone, EGNN)
    for layer in backbone.layers:
        assert isinstance(layer, EGNNLayer)
        _after(layer.norm, _enter, group)
        _after(layer.messages.up.receiver, _gather, group)
        _after(layer.messages.up.sender, _gather, group)
        _before(layer.gathered, _gather, group)
        _after(layer.down, _sum, group)
        # Whole on every rank, but used for this rank's columns of the messages alone.
        if layer.messages.up.radial.weight.requires_grad:
            layer.messages.up.radial.weight.register_hook(group.sum)  # type: ignore[no-untyped-call]
    _after(backbone.norm, _enter, group)
    _after(potential.energy_head.down, _sum, group)
    if potential.force_head is not None:
        _after(potential.force_head, _sum, group)
    else:
        potential.register_forward_hook(lambda module, args, out: _whole(out, group))


def _apply(cut: Cut, whole: Tensor) -> Tensor:
    if cut.zero:
        return torch.zeros_like(whole)
    return whole if cut.dim is None else whole.narrow(cut.dim, cut.start, cut.stop - cut.start).clone()


def _whole(part: Prediction, group: Group) -> Prediction:
    """Forces and stress by gradient are linear in ∂E/∂r_ij, of which each rank has found a part."""
    return Prediction(
        energy=part.energy,
        forces=None if part.forces is None else _sum(part.forces, group),
        stress=None if part.stress is None else _sum(part.stress, group),
    )


def _after(module: nn.Module, change: Change, group: Group) -> None:
    module.register_forward_hook(lambda module, args, out: change(out, group))


def _before(module: nn.Module, change: Change, group: Group) -> None:
    module.register_forward_pre_hook(lambda module, args: (change(args[0], group),))


def _enter(values: Tensor, group: Group) -> Tensor:
    """The same values go different ways on the ranks: their gradients add up."""
    return _cross(values, group, "enter")


def _sum(values: Tensor, group: Group) -> Tensor:
    """Every rank's part added up; what depends on the sum is the same on all ranks, its gradient too."""
    return _cross(values, group, "sum")


def _gather(values: Tensor, group: Group) -> Tensor:
    """Slices of columns put together, to go different ways on the ranks."""
    return _cross(values, group, "gather")


def _cross(values: Tensor, group: Group, way: Way) -> Tensor:
    out: Tensor = _Crossing.apply(values, group, way)  # type: ignore[no-untyped-call]
    return out


class _Context(FunctionCtx):
    group: Group
    way: Way


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, values: Tensor, group: Group, way: Way) -> Tensor:
        ctx.group, ctx.way = group, way
        match way:
            case "enter":
                return values.view_as(values)
            case "sum":
                return group.sum(values)
            case "gather":
                return group.gather(values)
            case "sum_slice":
                return group.sum_slice(values)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return _cross(grad, ctx.group, _BACK[ctx.way]), None, None
