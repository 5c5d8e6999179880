"""Tensors that are computed again in a backward pass instead of being kept. Knows nothing of models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Recipe = Callable[[], Tensor]


class _Recipes(dict[tuple[int, int, tuple[int, ...]], Recipe]):
    """What makes which tensor."""

    def pack(self, tensor: Tensor) -> Tensor | Recipe:
        return self.get(_place(tensor), tensor)

    @staticmethod
    def unpack(packed: Tensor | Recipe) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return packed()


@contextmanager
def computed_again(*pairs: tuple[Tensor, Recipe]) -> Iterator[None]:
    """Within, operations keep a recipe in the place of a tensor that it makes, bit by bit.

    Unlike a checkpoint, what comes after the tensor is not computed again with it. Derivatives of any order
    are as before. Where somebody else already decides what is kept, as a checkpoint does, it is left to them.
    """
    outer = _in_force()
    if not torch.is_grad_enabled() or outer is None:
        yield
        return
    recipes = _Recipes(outer)
    recipes.update((_place(tensor), recipe) for tensor, recipe in pairs)
    with torch.autograd.graph.saved_tensors_hooks(recipes.pack, recipes.unpack):
        yield


def recipe_of(tensor: Tensor) -> Recipe:
    """What gives a tensor again: its recipe in a surrounding `computed_again`, or else the tensor, kept."""
    recipes, detached = _in_force(), tensor.detach()
    known = None if recipes is None else recipes.get(_place(tensor))
    return (lambda: detached) if known is None else known


def stays(module: nn.Module) -> bool:
    """Whether a module's weights are still there in the backward pass: ZeRO 3 takes those it marks away."""
    return not any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))


def _in_force() -> _Recipes | None:
    """The recipes of a surrounding `computed_again`, empty without one; None within somebody else's hooks."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return _Recipes()
    owner = getattr(hooks[0], "__self__", None)
    return owner if isinstance(owner, _Recipes) else None


def _place(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape)
