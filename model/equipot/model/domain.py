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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import Graph, SystemBatch
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
_PER_CHANNEL = RADIAL + (RADIAL // 2) * (3 + 6)
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

    def __call__(self, hood: "Neighborhoods") -> list[Verdict]:
        """A verdict for each structure; all of known elements."""
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
        for k in np.flatnonzero(np.bincount(hood.element_idx)).tolist():
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

    @staticmethod
    def of_graphs(graphs: Sequence[Graph], elements: tuple[int, ...]) -> "Neighborhoods":
        """Those of graphs, of which there is at least one."""
        n_atoms = np.array([graph.n_atoms for graph in graphs])
        offsets = np.repeat(np.cumsum(n_atoms) - n_atoms, [graph.n_edges for graph in graphs])
        numbers = np.concatenate([graph.system.atomic_numbers for graph in graphs])
        return Neighborhoods(
            element_idx=np.searchsorted(np.array(elements), numbers),
            system_idx=np.repeat(np.arange(len(graphs)), n_atoms),
            n_systems=len(graphs),
            vectors=np.concatenate([graph.vectors() for graph in graphs]),
            senders=np.concatenate([graph.senders for graph in graphs]) + offsets,
            receivers=np.concatenate([graph.receivers for graph in graphs]) + offsets,
        )


def channel_count(n_elements: int) -> int:
    """How many channels so many elements have."""
    return min(n_elements, CHANNELS)


def size_of(n_channels: int) -> int:
    """Numbers that describe an atom."""
    return n_channels * (RADIAL + 2 * (RADIAL // 2))


def describe(hood: Neighborhoods, cutoff: float, channels: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, D) what the surroundings of each atom are like; see the module."""
    n_atoms, (n_elements, n_channels) = len(hood.element_idx), channels.shape
    sums = np.zeros((n_atoms, n_channels, _PER_CHANNEL))
    # In parts that end with an atom, as edges times numbers would take much memory in one.
    ends = np.searchsorted(hood.receivers, np.arange(1, n_atoms + 1))
    start = atom = 0
    while start < len(hood.receivers):
        stop_atom = max(int(np.searchsorted(ends, start + _MOST_EDGES, side="right")), atom + 1)
        stop = int(ends[stop_atom - 1])
        if stop > start:
            part = slice(start, stop)
            # By receiver and sender's element first: of these there are fewer than edges to be weighted.
            pairs = hood.receivers[part] * n_elements + hood.element_idx[hood.senders[part]]
            order = np.argsort(pairs, kind="stable")
            pairs, firsts = _runs(pairs[order])
            by_pair = np.add.reduceat(_of_edges(hood.vectors[part][order], cutoff), firsts, axis=0)
            receivers, elements = np.divmod(pairs, n_elements)
            by_pair = channels[elements][:, :, None] * by_pair[:, None, :]
            receivers, firsts = _runs(receivers)
            sums[receivers] = np.add.reduceat(by_pair, firsts, axis=0)
        start, atom = stop, stop_atom
    plain, first, second = np.split(sums, [RADIAL, RADIAL + 3 * (RADIAL // 2)], axis=2)
    return np.concatenate(
        [
            plain.reshape(n_atoms, -1),
            _lengths(first.reshape(n_atoms, n_channels * (RADIAL // 2), 3)),
            _lengths(second.reshape(n_atoms, n_channels * (RADIAL // 2), 6)),
        ],
        axis=1,
    )


def _runs(ascending: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The values that come, and where each begins."""
    firsts = np.flatnonzero(np.diff(ascending, prepend=-1))
    return ascending[firsts], firsts


def _lengths(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = (vectors * vectors).sum(-1)
    return np.sqrt(squares + _SOFT)


def _of_edges(vectors: NDArray[np.float64], cutoff: float) -> NDArray[np.float64]:
    """What each neighbour adds to the sums of its channel, before weights: (E, R + R/2·(3 + 6))."""
    n, half = len(vectors), RADIAL // 2
    lengths = np.sqrt((vectors * vectors).sum(-1))
    x = np.minimum(lengths / cutoff, 1.0)
    found = np.empty((n, _PER_CHANNEL))
    radial = found[:, :RADIAL]
    radial[:, 0] = np.sin(np.pi * x)
    twice_cos = 2 * np.cos(np.pi * x)
    radial[:, 1] = twice_cos * radial[:, 0]
    for k in range(2, RADIAL):
        radial[:, k] = twice_cos * radial[:, k - 1] - radial[:, k - 2]
    radial *= ((1 - x * x) ** 3 / x)[:, None]
    unit = vectors / lengths[:, None]
    a, b, c = unit.T
    r2 = math.sqrt(2)
    tensor = np.empty((n, 6))
    # The six numbers of r̂r̂ − 1/3, of which those beside the diagonal stand for two.
    for place, values in enumerate((a * a, b * b, c * c)):
        tensor[:, place] = values - 1 / 3
    for place, values in enumerate((a * b, a * c, b * c), 3):
        tensor[:, place] = r2 * values
    directed = radial[:, :half, None]
    np.multiply(directed, unit[:, None, :], out=found[:, RADIAL : RADIAL + 3 * half].reshape(n, half, 3))
    np.multiply(directed, tensor[:, None, :], out=found[:, RADIAL + 3 * half :].reshape(n, half, 6))
    return found
