"""How many floating-point operations a training step's matrix products are, by configuration. Knows no torch.

Counted is what the function needs, as torch's autograd evaluates it; of the EGNN, in the split form of its
messages (:mod:`equipot.model.messages`): what other forms, empty slots of edges (:mod:`equipot.model.slots`),
activation checkpointing or ZeRO stage 3 do besides is not. A product of (n, a) and (a, b) numbers is 2·n·a·b
operations, and everything else is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from equipot.model.config import ModelConfig
from equipot.train.recipe import Recipe
from equipot.train.scaling.controls.attention import n_heads


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a training step: so many for each atom, and for each directed edge."""

    per_atom: float
    per_edge: float

    def of(self, atoms: float, edges: float) -> float:
        """Of a batch."""
        return self.per_atom * atoms + self.per_edge * edges


@dataclass(frozen=True, slots=True)
class Product:
    """Features times a weight, or features times features."""

    size: int
    """of the weight, or products of two numbers that one atom or edge takes"""
    per_edge: bool
    head: bool = False
    moves: bool = True
    """whether the features depend on positions"""
    learns: bool = True
    """whether the features depend on weights"""
    last: bool = False
    """whether the energy, or a direct force, is linear in the result"""
    with_geometry: bool = False
    """whether the other factor is no weight, but numbers that depend on positions alone"""


def training_flops(config: ModelConfig, *, by_gradient: bool, heads_only: bool = False) -> Flops:
    """Operations of a step's forward and backward passes.

    Args:
        config: of the model.
        by_gradient: the loss looks at derivatives of the energy: conservative forces, or stress.
        heads_only: the other weights are frozen.
    """
    atoms = edges = 0.0
    for product in _products(config):
        frozen = heads_only and not product.head
        times = _by_gradient(product, frozen) if by_gradient else _plain(product, frozen, heads_only)
        flops = 2.0 * product.size * times
        edges += flops if product.per_edge else 0.0
        atoms += 0.0 if product.per_edge else flops
    return Flops(atoms, edges)


def step_flops(recipe: Recipe, config: ModelConfig) -> Flops:
    """Operations of a step of a recipe's training of a model."""
    by_gradient = config.forces == "conservative" and recipe.loss.forces + recipe.loss.stress > 0
    heads_only = recipe.finetune is not None and recipe.finetune.weights == "heads"
    return training_flops(config, by_gradient=by_gradient, heads_only=heads_only)


def _plain(product: Product, frozen: bool, heads_only: bool) -> int:
    # forward; then the weight's gradient; then that of the features, unless nothing before them learns
    if frozen:
        return 1
    by_features = product.last or product.with_geometry if heads_only else product.learns
    return 1 + (not product.with_geometry) + by_features


def _by_gradient(product: Product, frozen: bool) -> int:
    # forward, and its gradients by weight and features; the first derivative, and its gradients likewise
    if not product.moves:  # no part of the first derivative; what it is made of learns, unless frozen
        return 1 if frozen else 3
    if product.with_geometry:  # two first derivatives, and of each and of the forward pass two gradients
        return 3 + 3 * 2
    return 2 + (not frozen) + 1 + (not frozen) + (not product.last)


def _products(config: ModelConfig) -> Iterator[Product]:
    width, levels = config.width, len(config.levels_of_theory)
    if config.inputs == "raw":
        yield Product(3 * width, per_edge=False, learns=False)
    for layer in range(config.layers):
        yield from _LAYERS[config.architecture](config, layer > 0)
    hidden = max(width // 2, 1)
    yield Product(width * hidden, per_edge=False, head=True)
    yield Product(hidden * levels, per_edge=False, head=True, last=True)
    if config.forces == "invariant":
        yield Product(width**2, per_edge=False, head=True)
        yield Product(3 * width * levels, per_edge=False, head=True, last=True)
    elif config.forces == "direct":
        yield from _moment_forces(config) if config.architecture == "moments" else _pair_forces(config)


def _pair_forces(config: ModelConfig) -> Iterator[Product]:
    width, levels = config.width, len(config.levels_of_theory)
    for _ in ("receiver", "sender"):
        yield Product(width**2, per_edge=False, head=True)
    yield Product(config.radial * width, per_edge=True, head=True, learns=False)
    yield Product(width * levels, per_edge=True, head=True, last=True)


def _moment_forces(config: ModelConfig) -> Iterator[Product]:
    width, levels = config.width, len(config.levels_of_theory)
    for _ in ("sender", "up"):
        yield Product(width**2, per_edge=False, head=True)
    yield Product(config.radial * width, per_edge=True, head=True, learns=False)
    yield Product(_DEGREES[1] * width, per_edge=True, head=True, with_geometry=True)
    yield Product(3 * width * levels, per_edge=False, head=True, last=True)


def _egnn(config: ModelConfig, moves: bool) -> Iterator[Product]:
    width = config.width
    for _ in ("receiver", "sender", "own"):
        yield Product(width**2, per_edge=False, moves=moves)
    for _ in ("gathered", "down"):
        yield Product(width**2, per_edge=False)
    yield Product(config.radial * width, per_edge=True, learns=False)
    yield Product(width**2, per_edge=True)


_DEGREES = (1, 3, 5)
"""Harmonics of each degree; `equipot.model.harmonics` has them, and torch."""


def _moments(config: ModelConfig, moves: bool) -> Iterator[Product]:
    width = config.width
    for _ in ("sender", "own"):
        yield Product(width**2, per_edge=False, moves=moves)
    yield Product(config.radial * width, per_edge=True, learns=False)
    yield Product(sum(_DEGREES) * width, per_edge=True, with_geometry=True)
    for size in (*_DEGREES[1:], len(_DEGREES), 1):  # mixed moments, gathered, down
        yield Product(size * width**2, per_edge=False)


def _transformer(config: ModelConfig, moves: bool) -> Iterator[Product]:
    width = config.width
    for _ in ("query", "key", "value"):
        yield Product(width**2, per_edge=False, moves=moves)
    yield Product(config.radial * n_heads(width), per_edge=True, learns=False)
    for size in (1, 2, 2):  # out, up, down
        yield Product(size * width**2, per_edge=False)


def _gcn(config: ModelConfig, moves: bool) -> Iterator[Product]:
    yield Product(config.width**2, per_edge=False, moves=moves)
    yield Product(config.radial, per_edge=True, learns=False)


def _gat(config: ModelConfig, moves: bool) -> Iterator[Product]:
    yield Product(config.width**2, per_edge=False, moves=moves)
    for per_edge in (True, False):  # every atom is its own neighbour
        yield Product(config.radial * config.width, per_edge=per_edge, learns=False)


_LAYERS: Mapping[str, Callable[[ModelConfig, bool], Iterator[Product]]] = {
    "egnn": _egnn,
    "moments": _moments,
    "transformer": _transformer,
    "gcn": _gcn,
    "gat": _gat,
}
"""Of one layer; the bool says whether its input depends on positions."""
