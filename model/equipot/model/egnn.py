"""The EGNN backbone: invariant features of atoms by message passing.

The invariant part of Satorras, Hoogeboom, Welling, "E(n) equivariant graph neural networks" (2021): atoms
stay where the structure puts them, so the paper's coordinate update has no place here; vectors appear in the
heads alone.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from equipot.model.backbone import Stack
from equipot.model.config import MessageForm, ModelConfig
from equipot.model.geometry import Edges
from equipot.model.messages import MessageSum
from equipot.model.node_linear import NodeLinear
from equipot.model.norm import LayerNorm
from equipot.model.recalled import Recipe, computed_again, stays
from equipot.model.residual import Residual


class EGNNLayer(nn.Module):
    """One round of messages: u_i = W_d silu(W_c h_i + W_g Σ_j m_ij / √mean_neighbors + b) + b'."""

    def __init__(self, config: ModelConfig, form: MessageForm, place: int) -> None:
        super().__init__()
        width = config.width
        self.norm = LayerNorm(width) if config.normalisation == "layer" else nn.Identity()
        self.messages = MessageSum(width, config.radial, form=form)
        self.own = NodeLinear(width, width)
        self.gathered = NodeLinear(width, width, bias=False)
        self.down = NodeLinear(width, width)
        self.residual = Residual(config, place)
        self.forgets = form == "lean"
        # The root keeps a sum of n independent messages at the size of one; dividing by n instead left a
        # quarter more force error after the same training.
        self.message_scale = config.mean_neighbors**-0.5

    def forward(self, stream: Tensor, edges: Edges) -> Tensor:
        """New features (N, H) from old; both in float32 or wider, the work in the weights' dtype."""
        dtype, put_off = edges.radial.dtype, edges.put_off
        h = self.norm(stream.to(dtype))
        kept = stream.detach()
        with self._again(h, lambda: self.norm(kept.to(dtype)), put_off):
            gathered = (self.messages(h, edges) * self.message_scale).to(dtype)
            before = self.own(h, put_off) + self.gathered(gathered, put_off)
        hidden = functional.silu(before)
        rows = before.detach()
        with self._again(hidden, lambda: functional.silu(rows), put_off):
            update: Tensor = self.down(hidden, put_off).to(stream.dtype)
        return self.residual.leave(stream, update)

    def _again(self, tensor: Tensor, recipe: Recipe, put_off: bool) -> AbstractContextManager[None]:
        """Lean forgets what little work makes again, but for second derivatives."""
        leave = not self.forgets or put_off or not (stays(self.norm) and stays(self.down))
        return nullcontext() if leave else computed_again((tensor, recipe))


class EGNN(Stack):
    """A stack of layers."""

    has_forms: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        forms = enumerate(config.message_forms)
        super().__init__(config, (EGNNLayer(config, form, place) for place, form in forms))
