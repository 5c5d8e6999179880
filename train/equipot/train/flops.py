"""How many floating-point operations a training step's matrix products are, by configuration. Knows no torch.

Counted is what the function needs, in the split form of its messages (:mod:`equipot.model.messages`): what
other forms, activation checkpointing or ZeRO stage 3 do besides is not. A product of (n, a) and (a, b)
numbers is 2·n·a·b operations, and everything else is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from equipot.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a training step: so many for each atom, and for each directed edge."""

    per_atom: float
    per_edge: float

    def of(self, atoms: float, edges: float) -> float:
        """Of a batch."""
        return self.per_atom * atoms + self.per_edge * edges


@dataclass(frozen=True, slots=True)
class _Product:
    """Features times a weight."""

    size: int
    """of the weight"""
    per_edge: bool
    head: bool
    moves: bool = True
    """whether the features depend on positions"""
    learns: bool = True
    """whether the features depend on weights"""
    last: bool = False
    """whether the energy, or a direct force, is linear in the result"""


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


def _plain(product: _Product, frozen: bool, heads_only: bool) -> int:
    # forward; then the weight's gradient; then that of the features, unless nothing before them learns
    if frozen:
        return 1
    return 2 + (product.last if heads_only else product.learns)


def _by_gradient(product: _Product, frozen: bool) -> int:
    # forward, and its gradients by weight and features; the first derivative, and its gradients likewise
    if not product.moves:  # no part of the first derivative; what it is made of learns, unless frozen
        return 1 if frozen else 3
    return 2 + (not frozen) + 1 + (not frozen) + (not product.last)


def _products(config: ModelConfig) -> Iterator[_Product]:
    width, radial, levels = config.width, config.radial, len(config.levels_of_theory)
    hidden = max(width // 2, 1)
    for layer in range(config.layers):
        for _ in ("receiver", "sender", "own"):
            yield _Product(width**2, per_edge=False, head=False, moves=layer > 0)
        for _ in ("gathered", "down"):
            yield _Product(width**2, per_edge=False, head=False)
        yield _Product(radial * width, per_edge=True, head=False, learns=False)
        yield _Product(width**2, per_edge=True, head=False)
    yield _Product(width * hidden, per_edge=False, head=True)
    yield _Product(hidden * levels, per_edge=False, head=True, last=True)
    if config.forces == "direct":
        for _ in ("receiver", "sender"):
            yield _Product(width**2, per_edge=False, head=True)
        yield _Product(radial * width, per_edge=True, head=True, learns=False)
        yield _Product(width * levels, per_edge=True, head=True, last=True)
