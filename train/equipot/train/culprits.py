"""Which structures made a step go wrong, gathered from all ranks, the worst first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.train.dataset import Dataset
from equipot.train.incidents import Culprit, Trouble
from equipot.train.world import World

_MOST = 1000  # of a rank


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What each structure of a micro-batch adds to the loss."""

    keys: NDArray[np.int64]
    """(S, 2) store and structure index"""
    losses: torch.Tensor
    """(S,)"""


def find_culprits(trouble: Trouble, shares: list[Share], dataset: Dataset, world: World) -> list[Culprit]:
    """The structures of a step that went wrong, the same on all ranks; collective.

    Those whose own loss is not finite, if there are any; else all, by what they add to the loss.
    """
    keys = np.concatenate([share.keys for share in shares])
    losses = torch.cat([share.losses for share in shares]).double().cpu().numpy()
    mine = np.column_stack([keys.astype(np.float64), losses])
    mine = mine[np.argsort(-np.where(np.isfinite(losses), losses, np.inf), kind="stable")][:_MOST]
    rows = np.concatenate([np.asarray(part).reshape(-1, 3) for part in world.gather(mine)])
    finite = np.isfinite(rows[:, 2])
    if trouble.what == "loss" and not finite.all():
        rows, finite = rows[~finite], finite[~finite]
    # by place where the loss does not tell, so that the order does not depend on the number of ranks
    order = np.lexsort((rows[:, 1], rows[:, 0], -np.where(finite, rows[:, 2], np.inf)))
    culprits = []
    for store, structure, loss in rows[order].tolist():
        path, file, frame = dataset.origin(int(store), int(structure))
        own = loss if np.isfinite(loss) else None
        culprits.append(Culprit(path, int(structure), file, frame, own))
    return culprits
