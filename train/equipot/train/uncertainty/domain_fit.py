"""Learns from the training split what surroundings are known, and from the validation split how far is far.

Knows no potential: nothing here is of a network.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import SystemBatch
from equipot.model.conformal import effective_size, rank_of
from equipot.model.domain import Domain, Neighborhoods, channel_count, describe, size_of

INSIDE = 0.99
"""Part of structures like those of the validation split that are to be inside."""

_FEW_ATOMS = 100
"""An element with fewer of them in the validation split takes the scale of all together."""

_RIDGE = 1e-3
"""Of a number's variance, added to it: what hardly varies in training is not measured more finely than so."""

_FLOOR = 1e-6
"""The same, of the mean variance of all numbers: some vary not at all in training."""


class DomainFit:
    """Sums over the training split, batch by batch."""

    def __init__(self, elements: tuple[int, ...], cutoff: float) -> None:
        """Args:
        elements: atomic numbers that the model knows.
        cutoff: Å.
        """
        self._elements, self._cutoff = elements, cutoff
        self._channels = channels_of(elements)
        k, d = len(elements), size_of(self._channels.shape[1])
        self._count = np.zeros(k, dtype=np.int64)
        self._sum = np.zeros((k, d))
        self._outer = np.zeros((k, d, d))
        self._shift: NDArray[np.float64] | None = None
        self._shortest = np.full((k, k), math.inf)

    def add(self, batch: SystemBatch) -> None:
        """Takes in one batch."""
        hood = Neighborhoods.of(batch, self._elements)
        found = describe(hood, self._cutoff, self._channels)
        if self._shift is None:
            self._shift = found.mean(axis=0)  # keeps squares small: sums of them lose no digits
        found -= self._shift
        for k in np.unique(hood.element_idx):
            rows = found[hood.element_idx == k]
            self._count[k] += len(rows)
            self._sum[k] += rows.sum(axis=0)
            self._outer[k] += rows.T @ rows
        pairs = hood.element_idx[hood.receivers], hood.element_idx[hood.senders]
        np.minimum.at(self._shortest, pairs, np.linalg.norm(hood.vectors, axis=1))

    def finish(self) -> Domain:
        """The domain in units of standard deviations; its border is not settled yet."""
        assert self._shift is not None
        count = np.maximum(self._count, 1)[:, None]
        mean = self._sum / count
        scatter = self._outer - count[:, :, None] * mean[:, :, None] * mean[:, None, :]
        pooled = scatter.sum(axis=0) / max(1, int(self._count.sum()))
        diagonal = np.diag(pooled)
        ridge = np.diag(_RIDGE * diagonal + _FLOOR * max(float(diagonal.mean()), 1e-12))
        d = len(pooled)
        whitening = np.empty_like(scatter)
        for k in range(len(mean)):
            covariance = (scatter[k] + d * pooled) / (self._count[k] + d) + ridge
            whitening[k] = np.linalg.inv(np.linalg.cholesky(covariance))
        return Domain(
            elements=self._elements,
            cutoff=self._cutoff,
            channels=self._channels,
            mean=mean + self._shift,
            whitening=whitening,
            shortest=self._shortest,
            seen=self._count,
        )


def with_border(
    domain: Domain,
    scores: NDArray[np.float64],
    element_idx: NDArray[np.int64],
    system_idx: NDArray[np.int64],
    groups: NDArray[np.int64],
) -> Domain:
    """The same, whose scores are 1 where as few structures of the validation split go beyond as intended.

    Args:
        domain: in any unit.
        scores: (N,) of the split's atoms by it.
        element_idx: (N,) of these.
        system_idx: (N,) of these, ascending from 0.
        groups: (S,) of the structures.
    """
    usual = np.full(len(domain.elements), float(np.quantile(scores, INSIDE)))
    for k in range(len(usual)):
        own = scores[element_idx == k]
        if len(own) >= _FEW_ATOMS:
            usual[k] = float(np.quantile(own, INSIDE))
    worst = np.zeros(len(groups))
    np.maximum.at(worst, system_idx, scores / usual[element_idx])
    rank = rank_of(len(worst), effective_size(worst, groups), INSIDE)
    border = float(np.sort(worst)[(rank or len(worst)) - 1])
    return replace(domain, whitening=domain.whitening / (usual * border)[:, None, None])


def channels_of(elements: tuple[int, ...]) -> NDArray[np.float64]:
    """(K, C) weights of elements: one channel each where there are few, else fixed unit vectors."""
    n = channel_count(len(elements))
    if n == len(elements):
        return np.eye(n)
    # The legacy generator: its numbers are promised never to change.
    table = np.random.RandomState(0).standard_normal((119, n))
    chosen: NDArray[np.float64] = table[list(elements)]
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    return chosen
