"""The moments backbone: features of atoms from moments of their neighbours' density, with angles.

With h the atoms' features, i an edge's receiver, j its sender, and Y_l the spherical harmonics of degree l:

    y_ij = (W_f rbf(d_ij)) ∘ (W_s h_j)
    A_i^l = Σ_j envelope(d_ij) / √mean_neighbors · Y_l(r̂_ij) ⊗ y_ij                 l = 0, 1, 2
    g_i = [A^0, √(1 + |A^1 W_1|²) − 1, √(1 + |A^2 W_2|²) − 1]
    u_i = W_d silu(W_c h_i + W_g g_i + b) + b'

All maps whose size is width × width are on atoms: of an edge only its radial basis is multiplied by a weight
(radial × width), where the messages of the EGNN take width × width. The squares of first and second moments
know the angles between neighbours, as the power spectrum of Bartók, Kondor, Csányi ("On representing chemical
environments", 2013) does. Messages that are linear in the neighbours' features, with products on atoms alone,
are those of the atomic cluster expansion (Drautz 2019) and of MACE (Batatia et al., arXiv 2206.07697), here
with invariant features and without Clebsch-Gordan products. Everything is smooth where the envelope is.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipot.model.backbone import Stack
from equipot.model.config import ModelConfig
from equipot.model.geometry import Edges
from equipot.model.harmonics import SIZES, harmonics
from equipot.model.norm import LayerNorm
from equipot.model.residual import Residual
from equipot.model.slots import Slots, slots_of, sums_in_slots


class Moments(nn.Module):
    """Moments (N, A, C) of the neighbours' density, in float32 or wider where the weights are narrower."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sender = nn.Linear(config.width, config.width, bias=False)
        self.filters = nn.Linear(config.radial, config.width, bias=False)

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """From features (N, H) and edges in slots, with A angular functions each."""
        assert edges.angular is not None
        assert edges.slots is not None
        y = self.filters(edges.radial) * self.sender(h).index_select(0, edges.senders)
        return sums_in_slots(edges.angular.to(y.dtype), y, edges.slots.groups)


class MomentsLayer(nn.Module):
    """One round of moments; see the module."""

    def __init__(self, config: ModelConfig, place: int) -> None:
        super().__init__()
        width = config.width
        self.norm = LayerNorm(width) if config.normalisation == "layer" else nn.Identity()
        self.moments = Moments(config)
        self.mix = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in SIZES[1:])
        self.own = nn.Linear(width, width)
        self.gathered = nn.Linear(len(SIZES) * width, width, bias=False)
        self.down = nn.Linear(width, width)
        self.residual = Residual(config, place)

    def forward(self, stream: Tensor, edges: Edges) -> Tensor:
        """New features (N, H) from old; both in float32 or wider, the work in the weights' dtype."""
        dtype = edges.radial.dtype
        h = self.norm(stream.to(dtype))
        scalars, *others = self.moments(h, edges).split(SIZES, dim=1)
        gathered = [scalars.squeeze(1)]
        for mix, moment in zip(self.mix, others, strict=True):
            wide = mix(moment).to(stream.dtype)
            # The root grows as the moment does: squares themselves let one close pair drown the others.
            gathered.append((torch.sqrt(wide.square().sum(1) + 1.0) - 1.0).to(dtype))
        hidden = functional.silu(self.own(h) + self.gathered(torch.cat(gathered, dim=-1)))
        return self.residual.leave(stream, self.down(hidden).to(stream.dtype))


class MomentForces(nn.Module):
    """Direct forces F_i = W (silu(W_u h_i + b) ∘ A_i), A the first moments of the final features' density."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.moments = Moments(config)
        self.up = nn.Linear(config.width, config.width)
        self.down = nn.Linear(config.width, len(config.levels_of_theory), bias=False)
        self.scale = config.mean_neighbors**-0.5

    def forward(self, h: Tensor, edges: Edges, directions: Tensor, level: Tensor) -> Tensor:
        """As of `heads.ForceHead`."""
        assert edges.directions is not None
        slots = slots_of(edges.receivers, edges.n_atoms)
        vectors = self.moments(h[slots.order], _in_slots(edges, slots, edges.directions * self.scale))
        vectors = vectors[_inverse(slots.order)]
        forces: Tensor = self.down(functional.silu(self.up(h)).unsqueeze(1) * vectors)
        return forces.gather(-1, level.view(-1, 1, 1).expand(-1, 3, 1)).squeeze(-1).to(directions.dtype)


class MomentsBackbone(Stack):
    """A stack of layers."""

    reads_directions: ClassVar[bool] = True
    compiles: ClassVar[bool] = False
    force_head: ClassVar[type[nn.Module]] = MomentForces

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (MomentsLayer(config, place) for place in range(config.layers)))
        # The root keeps a sum of n independent messages at the size of one.
        self.scale = config.mean_neighbors**-0.5

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """Features (N, H) in the edges' dtype from embeddings (N, H)."""
        assert edges.directions is not None
        slots = slots_of(edges.receivers, edges.n_atoms)
        inner = _in_slots(edges, slots, harmonics(edges.directions) * self.scale)
        return super().forward(h[slots.order], inner)[_inverse(slots.order)]


def _in_slots(edges: Edges, slots: Slots, angular: Tensor) -> Edges:
    """What layers read of edges, a row for each slot; the envelope goes into the angular functions (E, A)."""
    weight = torch.where(slots.filled, edges.envelope[slots.edge], 0.0)
    return replace(
        edges,
        senders=_inverse(slots.order)[edges.senders[slots.edge]],
        radial=edges.radial[slots.edge],
        angular=angular[slots.edge] * weight,
        slots=slots,
    )


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
