"""What breaks symmetry in the runs of the scaling paper (arXiv 2504.08112): its inputs and its force head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from equipot.model.batch import SystemBatch
from equipot.model.config import ModelConfig
from equipot.model.geometry import Edges
from equipot.model.heads import Embedding


class RawEmbedding(Embedding):
    """Features (N, H) of atoms from their element and their coordinates: not invariant under rotations.

    Coordinates are those of the batch: below float64 relative to the structure's centre, so the energy of a
    structure stays when it is moved as a whole, but not when an atom of a crystal is replaced by its image.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.coordinates = nn.Linear(3, config.width, bias=False)

    def forward(self, batch: SystemBatch, element_idx: Tensor) -> Tensor:
        """As `Embedding`."""
        positions: Tensor = self.coordinates(batch.positions.to(self.coordinates.weight.dtype))
        return super().forward(batch, element_idx) + positions


class InvariantForceHead(nn.Module):
    """Forces (N, 3) as three numbers that each atom's features give: they do not turn with the structure."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.width)
        self.down = nn.Linear(config.width, 3 * len(config.levels_of_theory), bias=False)

    def forward(self, h: Tensor, edges: Edges, directions: Tensor, level: Tensor) -> Tensor:
        """As `heads.ForceHead`."""
        forces: Tensor = self.down(functional.silu(self.up(h))).view(len(h), -1, 3)
        place = level.view(-1, 1, 1).expand(-1, 1, 3)
        return forces.gather(1, place).squeeze(1).to(directions.dtype)
