"""In which order points are run, and which of them a compute budget covers. Knows no processes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from equipot.train.scaling.declaration import StudyError
from equipot.train.scaling.planning import Planned

_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


def in_order(points: Sequence[Planned]) -> list[Planned]:
    """Tier by tier; of each the cheaper half first, so that there is something to see, then the rest.

    The rest begins with its largest: one that was begun last would be waited for by all other workers.
    """
    ordered: list[Planned] = []
    by_tier = sorted(points, key=lambda each: (each.tier, each.point.target_flops, each.point.name))
    for _, tier in groupby(by_tier, key=lambda each: each.tier):
        rising = list(tier)
        half = len(rising) // 2
        ordered += rising[:half] + rising[half:][::-1]
    return ordered


def within(points: Sequence[Planned], flops: float) -> list[Planned]:
    """What a budget covers, in order; a point that is too dear is passed over for those after it.

    Finished points count as well: the same budget covers the same points, whenever it is asked.
    """
    taken = []
    for each in points:
        if each.point.target_flops <= flops:
            taken.append(each)
            flops -= each.point.target_flops
    return taken


def shared(points: Sequence[Planned], share: str) -> list[Planned]:
    """Of n machines that share no folder, the points of the k-th, as "k/n"; all machines get of every tier.

    Raises:
        StudyError: not such a text.
    """
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", share)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise StudyError(f"--share {share}: write it as 1/2 and 2/2 for two machines")
    return list(points[int(found[1]) - 1 :: int(found[2])])


def parse_budget(text: str) -> tuple[float | None, float | None]:
    """(FLOPs, seconds) of "15 min", "6 h" or "2e14": one of them, the other None.

    Raises:
        StudyError: neither.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].lower() if found else ""
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    if value <= 0 or unit not in ("", "flop", "flops", *_SECONDS):
        raise StudyError(f'--budget {text}: give a time, as "15 min" or "6 h", or model FLOPs, as 2e14')
    return (value, None) if unit in ("", "flop", "flops") else (None, value * _SECONDS[unit])
