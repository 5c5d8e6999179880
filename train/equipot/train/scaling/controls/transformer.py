"""A transformer over atoms: attention among the atoms within the cutoff, biased by their distance.

Who sees whom is what edges say: all atoms of a structure that is smaller than the cutoff, and in a crystal
every periodic image within it, so that supercells agree and batches stay apart. Of a distance nothing is read
but the bias, as in Graphormer (Ying et al., arXiv 2106.05234). An atom attends to itself, too, with a weight
that no neighbour's envelope changes: a neighbour that leaves takes its weight with it, smoothly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipot.model.backbone import Stack
from equipot.model.config import ModelConfig
from equipot.model.geometry import Edges, sum_by_index
from equipot.model.norm import LayerNorm
from equipot.model.residual import Residual
from equipot.train.scaling.controls.attention import n_heads


class TransformerLayer(nn.Module):
    """Pre-norm attention and a feed-forward net of twice the width."""

    def __init__(self, config: ModelConfig, place: int) -> None:
        super().__init__()
        width, norms = config.width, config.normalisation == "layer"
        self.heads = n_heads(width)
        self.norm = LayerNorm(width) if norms else nn.Identity()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.bias = nn.Linear(config.radial, self.heads, bias=False)
        self.out = nn.Linear(width, width)
        self.second_norm = LayerNorm(width) if norms else nn.Identity()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.residual = Residual(config, place)

    def forward(self, stream: Tensor, edges: Edges) -> Tensor:
        """New features (N, H) from old."""
        dtype = edges.radial.dtype
        attended = self.out(self._attend(self.norm(stream.to(dtype)), edges)).to(stream.dtype)
        # Where a layer replaces its input, attention does; the feed-forward net adds to it in any case.
        between = self.residual.leave(stream, attended)
        update = self.down(functional.silu(self.up(self.second_norm(between.to(dtype)))))
        out: Tensor = between + update.to(stream.dtype)
        return out

    def _attend(self, h: Tensor, edges: Edges) -> Tensor:
        n, heads = edges.n_atoms, self.heads
        query, key, value = (part(h).view(n, heads, -1) for part in (self.query, self.key, self.value))
        query = query / math.sqrt(query.shape[-1])
        own = (query * key).sum(-1)
        senders, receivers = edges.senders, edges.receivers
        logits = (query[receivers] * key[senders]).sum(-1) + self.bias(edges.radial) * edges.envelope
        # The largest is taken away for the exponential's sake alone: the quotient does not depend on it.
        index = receivers.unsqueeze(-1).expand_as(logits)
        largest = own.detach().scatter_reduce(0, index, logits.detach(), "amax")
        weights = torch.exp(logits - largest[receivers]) * edges.envelope
        self_weight = torch.exp(own - largest)
        total = self_weight + sum_by_index(weights, receivers, n)
        sums = sum_by_index(weights.unsqueeze(-1) * value[senders], receivers, n)
        mixed = (sums + self_weight.unsqueeze(-1) * value) / total.unsqueeze(-1)
        out: Tensor = mixed.reshape(n, -1).to(h.dtype)
        return out


class TransformerBackbone(Stack):
    """A stack of layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (TransformerLayer(config, place) for place in range(config.layers)))
