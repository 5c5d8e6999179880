"""Whether the surroundings of every atom are such as training saw. Knows nothing of networks.

An atom is described by sums over its neighbours that do not change when the structure is moved, turned or
renumbered, and that a neighbour leaves smoothly at the cutoff:

    a_ck = Σ_j w_c(Z_j) f_k(d_ij)     p_ck = |Σ_j w_c(Z_j) f_k(d_ij) r̂_ij|     q_ck = |Σ_j w_c f_k (r̂r̂ − 1/3)|

with weights w of elements (Gastegger et al., J. Chem. Phys. 148, 241709, 2018) and f_k = sin(kπx)/x times a
window. How far it is from those of its element is Mahalanobis' distance, the covariance of rare elements
drawn to that of all (Friedman, J. Am. Stat. Assoc. 84, 165, 1989). It is independent of the architecture,
and takes a small part of what the network takes. Beside it stand the shortest distances of pairs of elements.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import SystemBatch
from equipot.model.elements import symbol
from equipot.model.errors import BundleError

DOMAIN_FILE = "domain.safetensors"

RADIAL = 8
"""Functions of the distance in sums without directions, and half as many in those with them."""

CHANNELS = 4
"""Weights of an element; where there are no more elements, each has a channel of its own."""

SHORTEST_SHARE = 0.95
"""Pairs are too close below this part of the shortest distance that was seen."""

_MOST_EDGES = 16_384
_SOFT = 0.01
_TENSORS = ("channels", "mean", "whitening", "shortest", "seen")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one structure.

    Attributes:
        score: of its strangest atom: 1 at the border, more beyond.
        atom: that one's index, or that of the one the reason is about.
        reason: why the structure is outside; empty if it is not.
    """

    score: float
    atom: int
    reason: str

    @property
    def outside(self) -> bool:
        """Whether the model has seen nothing like it."""
        return bool(self.reason)


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """What training saw of K elements, with C channels and D numbers of an atom.

    Attributes:
        elements: atomic numbers, ascending.
        cutoff: Å.
        channels: (K, C) weights.
        mean: (K, D) of each element's atoms.
        whitening: (K, D, D): times the difference to the mean it is a vector whose length is the score.
        shortest: (K, K) Å; infinite where such a pair was never within the cutoff.
        seen: (K,) atoms of each element that were looked at.
    """

    elements: tuple[int, ...]
    cutoff: float
    channels: NDArray[np.float64]
    mean: NDArray[np.float64]
    whitening: NDArray[np.float64]
    shortest: NDArray[np.float64]
    seen: NDArray[np.int64]

    def __call__(self, batch: SystemBatch) -> list[Verdict]:
        """A verdict for each structure of a batch on the CPU that holds known elements alone."""
        hood = Neighborhoods.of(batch, self.elements)
        scores = self.scores(hood)
        first = np.searchsorted(hood.system_idx, np.arange(hood.n_systems + 1))
        found = []
        too_close = self._too_close(hood)
        for s in range(hood.n_systems):
            atoms = slice(first[s], first[s + 1])
            atom = int(scores[atoms].argmax())
            score = float(scores[atoms][atom])
            reason = ""
            if s in too_close:
                where, reason = too_close[s]
                atom, score = where - int(first[s]), max(score, 1.0)
            elif not self.seen[hood.element_idx[atoms]].all():
                atom = int((self.seen[hood.element_idx[atoms]] == 0).argmax())
                name = symbol(self.elements[hood.element_idx[atoms][atom]])
                score, reason = max(score, 1.0), f"atom {atom} is {name}, of which training saw none"
            elif score > 1:
                name = symbol(self.elements[hood.element_idx[atoms][atom]])
                reason = (
                    f"the surroundings of atom {atom} ({name}) are unlike those of any {name} in training: "
                    f"{score:.3g} times as far off as the border"
                )
            found.append(Verdict(score, atom, reason))
        return found

    def scores(self, hood: "Neighborhoods") -> NDArray[np.float64]:
        """(N,) of every atom."""
        off = describe(hood, self.cutoff, self.channels) - self.mean[hood.element_idx]
        scores = np.empty(len(off))
        for k in np.unique(hood.element_idx):
            rows = hood.element_idx == k
            scores[rows] = np.linalg.norm(off[rows] @ self.whitening[k].T, axis=1)
        return scores

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What a bundle keeps of it, by name."""
        return {
            name: np.ascontiguousarray(value, np.int64 if name == "seen" else np.float32)
            for name in _TENSORS
            for value in [getattr(self, name)]
        }

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, NDArray[Any]], elements: tuple[int, ...], cutoff: float
    ) -> "Domain":
        """The inverse of `tensors`.

        Raises:
            BundleError: a tensor is missing, has another shape, or holds what is no number.
        """
        if missing := sorted(set(_TENSORS) - set(tensors)):
            raise BundleError(f"{DOMAIN_FILE}: tensor {missing[0]!r} is missing; calibrate the bundle again")
        k = len(elements)
        c = channel_count(k)
        d = size_of(c)
        shapes = dict(zip(_TENSORS, ((k, c), (k, d), (k, d, d), (k, k), (k,)), strict=True))
        for name, shape in shapes.items():
            values = tensors[name]
            infinite = np.isinf(values) & (values > 0) if name == "shortest" else False
            if values.shape != shape or not (np.isfinite(values) | infinite).all():
                raise BundleError(
                    f"{DOMAIN_FILE}: tensor {name!r} of shape {values.shape} is not finite numbers of shape "
                    f"{shape}; calibrate the bundle again"
                )
        wide = {name: tensors[name].astype(np.float64) for name in _TENSORS if name != "seen"}
        return Domain(elements, cutoff, **wide, seen=tensors["seen"].astype(np.int64))

    def _too_close(self, hood: "Neighborhoods") -> dict[int, tuple[int, str]]:
        """By structure the atom at fault, and why: of the pair that is shortest beside what was seen."""
        pairs = hood.element_idx[hood.receivers], hood.element_idx[hood.senders]
        known = self.shortest[pairs]
        lengths = np.linalg.norm(hood.vectors, axis=1)
        bad = np.flatnonzero((lengths < SHORTEST_SHARE * known) & (lengths < self.cutoff))
        found = {}
        for edge in bad[np.argsort(-lengths[bad] / known[bad], kind="stable")].tolist():
            system = int(hood.system_idx[hood.receivers[edge]])
            start = int(np.searchsorted(hood.system_idx, system))
            atom, other = int(hood.receivers[edge]), int(hood.senders[edge])
            names = [symbol(self.elements[hood.element_idx[place]]) for place in (atom, other)]
            pair = f"atoms {atom - start} ({names[0]}) and {other - start} ({names[1]}) are"
            if math.isinf(known[edge]):
                reason = (
                    f"{pair} {lengths[edge]:.3f} Å apart, and training saw no such pair within the cutoff"
                )
            else:
                reason = f"{pair} {lengths[edge]:.3f} Å apart; the closest in training were {known[edge]:.3f}"
            found[system] = (atom, reason)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Neighborhoods:
    """N atoms of some systems and their E edges, as arrays.

    Attributes:
        element_idx: (N,) into the elements.
        system_idx: (N,) ascending.
        n_systems: how many.
        vectors: (E, 3) Å, from receiver to sender.
        senders: (E,).
        receivers: (E,) ascending.
    """

    element_idx: NDArray[np.int64]
    system_idx: NDArray[np.int64]
    n_systems: int
    vectors: NDArray[np.float64]
    senders: NDArray[np.int64]
    receivers: NDArray[np.int64]

    @staticmethod
    def of(batch: SystemBatch, elements: tuple[int, ...]) -> "Neighborhoods":
        """Those of a batch on the CPU."""
        positions = batch.positions.double().numpy()
        senders, receivers = batch.senders.numpy(), batch.receivers.numpy()
        system_idx = batch.system_idx.numpy()
        vectors = positions[senders] - positions[receivers]
        shifts = batch.cell_shifts.double().numpy()
        if shifts.any():
            vectors += np.einsum("ek,ekl->el", shifts, batch.cell.double().numpy()[system_idx[receivers]])
        numbers = np.searchsorted(np.array(elements), batch.atomic_numbers.numpy())
        return Neighborhoods(numbers, system_idx, batch.n_systems, vectors, senders, receivers)


def channel_count(n_elements: int) -> int:
    """How many channels so many elements have."""
    return min(n_elements, CHANNELS)


def size_of(n_channels: int) -> int:
    """Numbers that describe an atom."""
    return n_channels * (RADIAL + 2 * (RADIAL // 2))


def describe(hood: Neighborhoods, cutoff: float, channels: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, D) what the surroundings of each atom are like; see the module."""
    n_atoms, n_channels = len(hood.element_idx), channels.shape[1]
    half = RADIAL // 2
    sums = np.zeros((n_atoms, n_channels * (RADIAL + half * (3 + 6))))
    # In parts that end with an atom, as edges times numbers would take much memory in one.
    ends = np.searchsorted(hood.receivers, np.arange(1, n_atoms + 1))
    start = atom = 0
    while start < len(hood.receivers):
        stop_atom = max(int(np.searchsorted(ends, start + _MOST_EDGES, side="right")), atom + 1)
        stop = int(ends[stop_atom - 1])
        if stop > start:
            part = slice(start, stop)
            values = _of_edges(hood.vectors[part], channels[hood.element_idx[hood.senders[part]]], cutoff)
            receivers = hood.receivers[part]
            firsts = np.flatnonzero(np.diff(receivers, prepend=-1))
            sums[receivers[firsts]] = np.add.reduceat(values, firsts, axis=0)
        start, atom = stop, stop_atom
    plain, first, second = np.split(sums, np.cumsum([n_channels * RADIAL, n_channels * half * 3]), axis=1)
    first = first.reshape(n_atoms, -1, 3)
    second = second.reshape(n_atoms, -1, 6)
    return np.concatenate(
        [plain, np.sqrt((first**2).sum(-1) + _SOFT), np.sqrt((second**2).sum(-1) + _SOFT)], axis=1
    )


def _of_edges(
    vectors: NDArray[np.float64], weights: NDArray[np.float64], cutoff: float
) -> NDArray[np.float64]:
    """What each neighbour adds to the sums: (E, C·(R + R/2·(3 + 6)))."""
    lengths = np.linalg.norm(vectors, axis=1)
    x = np.minimum(lengths / cutoff, 1.0)
    radial = np.sin(np.pi * x[:, None] * np.arange(1, RADIAL + 1)) * ((1 - x**2) ** 3 / x)[:, None]
    unit = vectors / lengths[:, None]
    a, b, c = unit.T
    r2 = math.sqrt(2)
    # The six numbers of r̂r̂ − 1/3, of which those beside the diagonal stand for two.
    tensor = np.stack(
        [a * a - 1 / 3, b * b - 1 / 3, c * c - 1 / 3, r2 * a * b, r2 * a * c, r2 * b * c], axis=1
    )
    n, directed = len(x), (weights[:, :, None] * radial[:, None, : RADIAL // 2]).reshape(len(x), -1, 1)
    return np.concatenate(
        [
            (weights[:, :, None] * radial[:, None, :]).reshape(n, -1),
            (directed * unit[:, None, :]).reshape(n, -1),
            (directed * tensor[:, None, :]).reshape(n, -1),
        ],
        axis=1,
    )
