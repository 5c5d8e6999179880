"""Edges in rows of equal length, so that sums over the neighbours of many atoms are a few batched products.

Atoms are put in descending order of their number of edges and cut into groups; within a group every atom has
as many slots as the first has edges. Slots beyond an atom's own edges are empty and must count for nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FULL = 0.75
"""Least part of an atom's slots that hold an edge."""


class Group(NamedTuple):
    """Atoms [first, last) in the order of `Slots`, with so many slots each."""

    first: int
    last: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Where the edges of N atoms are among the S slots of all groups."""

    order: Tensor
    """(N,) the atoms by descending number of edges"""
    edge: Tensor
    """(S,) the edge in each slot; any where it is empty"""
    filled: Tensor
    """(S, 1) bool, whether the slot holds an edge"""
    groups: tuple[Group, ...]


def slots_of(receivers: Tensor, n_atoms: int) -> Slots:
    """Slots of edges whose receivers (E,) ascend, among so many atoms."""
    if receivers.is_meta:
        return _evenly(receivers, n_atoms)  # there are no numbers to look at
    degrees = torch.bincount(receivers, minlength=n_atoms)
    order = torch.argsort(degrees, descending=True, stable=True)
    groups = _groups(torch.bincount(degrees).tolist())
    per_atom = torch.tensor([group.size for group in groups], dtype=torch.int64).repeat_interleave(
        torch.tensor([group.last - group.first for group in groups], dtype=torch.int64)
    )
    per_atom = per_atom.to(receivers.device)
    atom = torch.arange(n_atoms, device=receivers.device).repeat_interleave(per_atom)
    within = torch.arange(len(atom), device=receivers.device) - (per_atom.cumsum(0) - per_atom)[atom]
    filled = within < degrees[order][atom]
    first_edge = (degrees.cumsum(0) - degrees)[order]
    edge = torch.where(filled, first_edge[atom] + within, 0)
    return Slots(order, edge, filled.unsqueeze(-1), groups)


def sums_in_slots(left: Tensor, right: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Σ over an atom's slots of left ⊗ right, (N, A, C) in the order of `Slots`, from (S, A) and (S, C)."""
    sums, at = [], 0
    for first, last, size in groups:
        n, stop = last - first, at + (last - first) * size
        one, other = (part[at:stop].view(n, size, part.shape[-1]) for part in (left, right))
        sums.append(torch.bmm(one.transpose(1, 2), other))
        at = stop
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _groups(atoms_by_degree: list[int]) -> tuple[Group, ...]:
    groups: list[Group] = []
    first = last = 0
    size = -1
    for degree in reversed(range(len(atoms_by_degree))):
        count = atoms_by_degree[degree]
        if not count:
            continue
        if last > first and (degree < FULL * size or degree == 0):
            groups.append(Group(first, last, size))
            first = last
        if last == first:
            size = degree
        last += count
    return (*groups, Group(first, last, size))


def _evenly(receivers: Tensor, n_atoms: int) -> Slots:
    size = -(-len(receivers) // max(n_atoms, 1))
    edge = receivers.new_empty(n_atoms * size)
    filled = edge.new_empty((len(edge), 1), dtype=torch.bool)
    return Slots(receivers.new_empty(n_atoms), edge, filled, (Group(0, n_atoms, size),))
