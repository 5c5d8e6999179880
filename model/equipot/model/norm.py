"""Layer normalisation that can be differentiated forwards and then backwards. Knows nothing of edges."""

import torch
from torch import Tensor, nn

from equipot.model.duals import has_tangent


class LayerNorm(nn.LayerNorm):
    """torch's own, but for dual numbers.

    torch differentiates its fused layer norm wrongly there: the tangent's formula takes mean and deviation
    for constants, so a gradient of a tangent lacks their share, without a word (seen with torch 2.13).
    """

    def forward(self, input: Tensor) -> Tensor:
        """The same shape and dtype."""
        if not has_tangent(input):
            return super().forward(input)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight + self.bias).to(input.dtype)
