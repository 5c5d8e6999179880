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
    for product in _PRODUCTS[config.architecture](config):
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


def _energy_head(config: ModelConfig) -> Iterator[Product]:
    hidden = max(config.width // 2, 1)
    yield Product(config.width * hidden, per_edge=False, head=True)
    yield Product(hidden * len(config.levels_of_theory), per_edge=False, head=True, last=True)


def _egnn(config: ModelConfig) -> Iterator[Product]:
    width, radial, levels = config.width, config.radial, len(config.levels_of_theory)
    for layer in range(config.layers):
        for _ in ("receiver", "sender", "own"):
            yield Product(width**2, per_edge=False, moves=layer > 0)
        for _ in ("gathered", "down"):
            yield Product(width**2, per_edge=False)
        yield Product(radial * width, per_edge=True, learns=False)
        yield Product(width**2, per_edge=True)
    yield from _energy_head(config)
    if config.forces == "direct":
        for _ in ("receiver", "sender"):
            yield Product(width**2, per_edge=False, head=True)
        yield Product(radial * width, per_edge=True, head=True, learns=False)
        yield Product(width * levels, per_edge=True, head=True, last=True)


_DEGREES = (1, 3, 5)  # harmonics of each degree; `equipot.model.harmonics` has them, and torch


def _moments(config: ModelConfig) -> Iterator[Product]:
    width, levels = config.width, len(config.levels_of_theory)
    for layer in range(config.layers):
        for _ in ("sender", "own"):
            yield Product(width**2, per_edge=False, moves=layer > 0)
        yield from _filters(config, sum(_DEGREES), head=False)
        for size in _DEGREES[1:]:
            yield Product(size * width**2, per_edge=False)
        yield Product(len(_DEGREES) * width**2, per_edge=False)
        yield Product(width**2, per_edge=False)
    yield from _energy_head(config)
    if config.forces == "direct":
        for _ in ("sender", "up"):
            yield Product(width**2, per_edge=False, head=True)
        yield from _filters(config, 3, head=True)
        yield Product(3 * width * levels, per_edge=False, head=True, last=True)


def _filters(config: ModelConfig, angular: int, *, head: bool) -> Iterator[Product]:
    yield Product(config.radial * config.width, per_edge=True, head=head, learns=False)
    yield Product(angular * config.width, per_edge=True, head=head, with_geometry=True)


_PRODUCTS: Mapping[str, Callable[[ModelConfig], Iterator[Product]]] = {"egnn": _egnn, "moments": _moments}
