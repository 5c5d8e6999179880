"""Where the controls enter the model."""

from __future__ import annotations

from equipot.model import potential
from equipot.train.scaling.controls.conventional import GATBackbone, GCNBackbone
from equipot.train.scaling.controls.paper import InvariantForceHead, RawEmbedding
from equipot.train.scaling.controls.transformer import TransformerBackbone


def register() -> None:
    """Let `equipot.model.potential.Potential` know the controls, in this process."""
    potential.BACKBONES |= {"transformer": TransformerBackbone, "gcn": GCNBackbone, "gat": GATBackbone}
    potential.EMBEDDINGS["raw"] = RawEmbedding
    potential.FORCE_HEADS["invariant"] = InvariantForceHead
