"""What networks with attention have in common."""

from __future__ import annotations

import math


def n_heads(width: int) -> int:
    """As many as eight, where they divide the width."""
    return math.gcd(width, 8)
