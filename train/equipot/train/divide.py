"""Divides numbered things into parts of nearly equal cost. Knows nothing of what they are."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

_GOOD_ENOUGH = 1.005  # dearest part over the best possible
_MOST_EXCHANGES = 200


def divide(costs: NDArray[np.int64], parts: int) -> list[NDArray[np.int64]]:
    """Positions 0…n−1 in `parts` lists of nearly equal cost, none empty if there are enough positions.

    Dearest first, each to the part with the least so far (Graham 1969: at most 4/3 of the best possible);
    then the dearest part exchanges things with others for as long as that makes it cheaper.
    """
    if parts == 1:
        return [np.arange(len(costs))]
    values: list[int] = costs.tolist()
    heap = [(0, 0, part) for part in range(parts)]  # cost, things, part
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for position in np.argsort(-costs, kind="stable").tolist():
        cost, count, part = heapq.heappop(heap)
        chosen[part].append(position)
        heapq.heappush(heap, (cost + values[position], count + 1, part))
    loads = np.array([sum(values[i] for i in part) for part in chosen])
    lists = [np.array(part, dtype=np.int64) for part in chosen]
    _exchange(lists, loads, costs)
    return [np.sort(part) for part in lists]


def _exchange(lists: list[NDArray[np.int64]], loads: NDArray[np.int64], costs: NDArray[np.int64]) -> None:
    best = max(float(loads.mean()), float(costs.max(initial=0)))
    for _ in range(_MOST_EXCHANGES):
        high = int(loads.argmax())
        if loads[high] <= _GOOD_ENOUGH * best:
            return
        for low in np.argsort(loads, kind="stable").tolist():
            gap = int(loads[high] - loads[low])
            found = _best_exchange(costs[lists[high]], costs[lists[low]], gap)
            if found is not None:
                break
        else:
            return
        give, take, moved = found
        lists[high][give], lists[low][take] = lists[low][take], lists[high][give]
        loads[high] -= moved
        loads[low] += moved


def _best_exchange(high: NDArray[np.int64], low: NDArray[np.int64], gap: int) -> tuple[int, int, int] | None:
    """Which of `high` to exchange for which of `low` to come nearest to half the gap, and what that moves."""
    if gap < 2 or not len(low):
        return None
    order = np.argsort(low, kind="stable")
    wanted = high - gap / 2
    place = np.clip(np.searchsorted(low[order], wanted), 0, len(low) - 1)
    before = np.maximum(place - 1, 0)
    options = np.concatenate([low[order][place], low[order][before]])
    off = np.abs(options - np.concatenate([wanted, wanted]))
    k = int(off.argmin())
    moved = int(np.concatenate([high, high])[k] - options[k])
    if not 0 < moved < gap:
        return None
    return k % len(high), int(order[np.concatenate([place, before])[k]]), moved
