"""What every network between embeddings and heads has in common: the seam at which architectures enter."""

from collections.abc import Callable, Iterable
from typing import ClassVar

from torch import Tensor, nn

from equipot.model.config import ModelConfig
from equipot.model.geometry import Edges
from equipot.model.heads import ForceHead
from equipot.model.norm import LayerNorm
from equipot.model.residual import layer_input

RunLayer = Callable[[nn.Module, Tensor, Edges], Tensor]


def run_layer_directly(layer: nn.Module, h: Tensor, edges: Edges) -> Tensor:
    """Calls the layer; training puts activation checkpointing in this place."""
    out: Tensor = layer(h, edges)
    return out


class Backbone(nn.Module):
    """Maps embeddings (N, H) and `Edges` to features (N, H) in the edges' dtype.

    Its layers are called through ``run_layer``, which may be replaced by a wrapper: from what goes through
    all layers, one tensor of N rows, and the edges, to the same. Parameters' names do not change by that.
    """

    reads_directions: ClassVar[bool] = False
    """Whether it reads `Edges.directions`. Lengths alone make forces cheaper."""
    compiles: ClassVar[bool] = True
    """Whether torch.compile can follow it in eval mode."""
    has_forms: ClassVar[bool] = False
    """Whether its messages have the orders of evaluation of `ModelConfig.messages`."""
    force_head: ClassVar[type[nn.Module]] = ForceHead
    """What reads direct forces out of its features; made of the config, called as `ForceHead` is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self.run_layer: RunLayer = run_layer_directly

    def run_layers(self, layers: Iterable[nn.Module], h: Tensor, edges: Edges) -> Tensor:
        """What the last layer gives, of what the first is given."""
        first = h
        for layer in layers:
            h = self.run_layer(layer, layer_input(self._config, h, first), edges)
        return h


class Stack(Backbone):
    """Layers one after the other, and a normalisation."""

    def __init__(self, config: ModelConfig, layers: Iterable[nn.Module]) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(layers)
        self.norm = LayerNorm(config.width) if config.normalisation == "layer" else nn.Identity()

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """Features (N, H) in the edges' dtype from embeddings (N, H)."""
        out: Tensor = self.norm(self.run_layers(self.layers, h, edges).to(edges.radial.dtype))
        return out
