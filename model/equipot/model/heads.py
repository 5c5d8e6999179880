"""What goes into a backbone and what is read out of it: embeddings, atomic energies, direct forces."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipot.model.batch import SystemBatch
from equipot.model.config import ModelConfig
from equipot.model.geometry import Edges, sum_by_index
from equipot.model.messages import PairLinear, edge_strengths


class Lookup(nn.Module):
    """Places of known integers in their list. An unknown one gives −1, which an embedding refuses."""

    table: Tensor

    def __init__(self, known: tuple[int, ...]) -> None:
        super().__init__()
        self.lowest = known[0]
        # device="cpu": a model built on the meta device still needs this table, which no checkpoint holds.
        table = torch.full((known[-1] - known[0] + 1,), -1, dtype=torch.int64, device="cpu")
        table[torch.tensor(known, device="cpu") - known[0]] = torch.arange(len(known), device="cpu")
        self.register_buffer("table", table, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Indices of the same shape."""
        place = values - self.lowest
        inside = (place >= 0) & (place < len(self.table))
        return torch.where(inside, self.table[place.clamp(0, len(self.table) - 1)], -1)


class Embedding(nn.Module):
    """Features (N, H) of atoms from their element, and from the system's charge and spin where these vary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.elements = Lookup(config.elements)
        self.element = nn.Embedding(len(config.elements), config.width)
        self.charges = Lookup(config.charges)
        self.spins = Lookup(config.spin_multiplicities)
        varied_charge, varied_spin = len(config.charges) > 1, len(config.spin_multiplicities) > 1
        self.charge = nn.Embedding(len(config.charges), config.width) if varied_charge else None
        self.spin = nn.Embedding(len(config.spin_multiplicities), config.width) if varied_spin else None

    def forward(self, batch: SystemBatch, element_idx: Tensor) -> Tensor:
        """In the parameters' dtype; element_idx (N,) comes from ``elements``."""
        h: Tensor = self.element(element_idx)
        if self.charge is not None:
            h = h + self.charge(self.charges(batch.charge))[batch.system_idx]
        if self.spin is not None:
            h = h + self.spin(self.spins(batch.spin_multiplicity))[batch.system_idx]
        return h


class EnergyHead(nn.Module):
    """Atomic energies in units of the references' scale, one column per level of theory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = max(config.width // 2, 1)
        self.up = nn.Linear(config.width, hidden)
        self.down = nn.Linear(hidden, len(config.levels_of_theory), bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(N, levels) from features (N, H)."""
        out: Tensor = self.down(functional.silu(self.up(h)))
        return out


class ForceHead(nn.Module):
    """Direct forces F_i = Σ_j φ_f(m_ij) r̂_ij: they turn with the structure, but are no energy's gradient.

    The message m_ij = envelope · silu(z_ij) is one of its own, of the final features, so a force sees every
    layer; φ_f is linear. In the split form it needs no matrix product on edges.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = PairLinear(config.width, config.radial, form=config.message_forms[-1])
        self.down = nn.Linear(config.width, len(config.levels_of_theory), bias=False)

    def forward(self, h: Tensor, edges: Edges, directions: Tensor, level: Tensor) -> Tensor:
        """(N, 3) in units of the references' scale per Å, in the directions' dtype or wider.

        Args:
            h: features (N, H).
            edges: the same edges as the backbone saw.
            directions: (E, 3) unit vectors.
            level: (N,) level of theory of each atom's system.
        """
        strength = edge_strengths(self.up, self.down, h, edges)
        strength = strength.gather(-1, level[edges.receivers].unsqueeze(-1)).to(directions.dtype)
        return sum_by_index(strength * directions, edges.receivers, edges.n_atoms)
