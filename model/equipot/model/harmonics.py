"""Functions of a direction: real spherical harmonics. Knows nothing of atoms or distances."""

import math

import torch
from torch import Tensor

SIZES = (1, 3, 5)
"""Functions of degree 0, 1 and 2."""


def harmonics(directions: Tensor) -> Tensor:
    """(E, 9) real spherical harmonics of unit vectors (E, 3), degrees 0, 1 and 2 in turn, of mean square 1.

    A rotation mixes those of one degree among themselves by an orthogonal matrix; an inversion changes the
    sign of degree 1. So sums of squares over a degree are invariant under both.
    """
    x, y, z = directions.unbind(-1)
    one, two = math.sqrt(3.0), math.sqrt(15.0)
    parts = [torch.ones_like(x), one * x, one * y, one * z]
    parts += [two * x * y, two * y * z, two * x * z]
    parts += [0.5 * math.sqrt(5.0) * (3.0 * z * z - 1.0), 0.5 * two * (x * x - y * y)]
    return torch.stack(parts, dim=-1)
