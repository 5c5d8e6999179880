"""Which words of a recipe are controls of the scaling study. Knows no torch."""

from __future__ import annotations

from equipot.model.config import ModelConfig

ARCHITECTURES = ("transformer", "gcn", "gat")


def control_of(config: ModelConfig) -> str | None:
    """The words of a config that make it a control, as ``architecture = 'gcn'``; None if nothing does."""
    if config.architecture in ARCHITECTURES:
        return f"architecture = {config.architecture!r}"
    if config.inputs == "raw":
        return "inputs = 'raw'"
    if config.forces == "invariant":
        return "forces = 'invariant'"
    return None
