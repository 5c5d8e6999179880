"""How a layer's update meets what went into the layer. Knows nothing of layers."""

import math

from torch import Tensor

from equipot.model.config import ModelConfig

ALPHA = 0.1
"""Share of the embeddings in every layer's input."""
LAMBDA = 0.5
"""Layer l's own share is log(λ / l + 1)."""


def layer_input(config: ModelConfig, stream: Tensor, first: Tensor) -> Tensor:
    """What a layer is given (N, …), of what the one before it gave and what the first one was given."""
    return (1.0 - ALPHA) * stream + ALPHA * first if config.residual == "initial" else stream


class Residual:
    """True: h + u. False: u. ``initial``: (1 − β) s + β u(s) with s = (1 − α) h + α h⁰ and h⁰ the embeddings.

    The last is that of GCNII (Chen, Wei, Huang, Ding, Li, "Simple and deep graph convolutional networks",
    arXiv 2007.02133, eq. 5), where β = log(λ / l + 1): deep layers change little, and none forgets what its
    atoms are.
    """

    def __init__(self, config: ModelConfig, place: int) -> None:
        """Of a layer, whose place is counted from 0."""
        self.initial = config.residual == "initial"
        self.adds = config.residual is True
        self._share = math.log(LAMBDA / (place + 1) + 1.0)

    def leave(self, stream: Tensor, update: Tensor) -> Tensor:
        """What a layer gives (N, …), of what it was given and its update."""
        if self.initial:
            return (1.0 - self._share) * stream + self._share * update
        return stream + update if self.adds else update
