"""Conventional graph networks, in torch_geometric's layers, with distances where a layer has a place.

GCN (Kipf, Welling, arXiv 1609.02907): an edge has one weight, the envelope times a learnt number of (0, 1) of
its radial basis; degrees are sums of envelopes, so it is smooth. GAT (Veličković et al., arXiv 1710.10903):
radial basis times envelope are an edge's attributes in the attention; its softmax knows no envelope, so
energies jump where a neighbour comes or goes. Every atom is its own neighbour in both; images are edges.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import GATConv, GCNConv

from equipot.model.backbone import Stack
from equipot.model.config import ModelConfig
from equipot.model.geometry import Edges, sum_by_index
from equipot.model.norm import LayerNorm
from equipot.model.residual import Residual
from equipot.train.scaling.controls.attention import n_heads


class ConvolutionLayer(nn.Module):
    """u = silu(convolution of the normalised features)."""

    def __init__(self, config: ModelConfig, place: int) -> None:
        super().__init__()
        self.norm = LayerNorm(config.width) if config.normalisation == "layer" else nn.Identity()
        self.residual = Residual(config, place)

    def forward(self, stream: Tensor, edges: Edges) -> Tensor:
        """New features (N, H) from old."""
        update = functional.silu(self.convolve(self.norm(stream.to(edges.radial.dtype)), edges))
        return self.residual.leave(stream, update.to(stream.dtype))

    def convolve(self, h: Tensor, edges: Edges) -> Tensor:
        """(N, H) from (N, H)."""
        raise NotImplementedError


class GCNLayer(ConvolutionLayer):
    """With the symmetric normalisation of the paper."""

    def __init__(self, config: ModelConfig, place: int) -> None:
        super().__init__(config, place)
        self.weight = nn.Linear(config.radial, 1)
        self.convolution = GCNConv(config.width, config.width, normalize=False, add_self_loops=False)

    def convolve(self, h: Tensor, edges: Edges) -> Tensor:
        """See the base class."""
        weight = (torch.sigmoid(self.weight(edges.radial)) * edges.envelope).squeeze(-1)
        degree = 1.0 + sum_by_index(edges.envelope.squeeze(-1), edges.receivers, edges.n_atoms).to(h.dtype)
        root = torch.rsqrt(degree)
        weight = weight * root[edges.senders] * root[edges.receivers]
        out: Tensor = self.convolution(h, _with_selves(edges), torch.cat([weight, 1.0 / degree]))
        return out


class GATLayer(ConvolutionLayer):
    """With up to eight heads."""

    def __init__(self, config: ModelConfig, place: int) -> None:
        super().__init__(config, place)
        heads = n_heads(config.width)
        self.convolution = GATConv(
            config.width, config.width // heads, heads=heads, edge_dim=config.radial, add_self_loops=False
        )

    def convolve(self, h: Tensor, edges: Edges) -> Tensor:
        """See the base class."""
        attributes = edges.radial * edges.envelope
        own = attributes.new_zeros(edges.n_atoms, attributes.shape[1])
        out: Tensor = self.convolution(h, _with_selves(edges), torch.cat([attributes, own]))
        return out


def _with_selves(edges: Edges) -> Tensor:
    own = torch.arange(edges.n_atoms, device=edges.senders.device)
    return torch.stack([torch.cat([edges.senders, own]), torch.cat([edges.receivers, own])])


class GCNBackbone(Stack):
    """A stack of layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (GCNLayer(config, place) for place in range(config.layers)))


class GATBackbone(Stack):
    """A stack of layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (GATLayer(config, place) for place in range(config.layers)))
