"""Functions of a distance: the radial basis and the envelope. Knows nothing of atoms."""

import math

import torch
from torch import Tensor

_ENVELOPE_ORDER = 6


def envelope(distances: Tensor, cutoff: float) -> Tensor:
    """(E,) weight that falls from 1 to exactly 0 at the cutoff, with two continuous derivatives there.

    The polynomial of Gasteiger, Groß, Günnemann, "Directional message passing for molecular graphs" (2020),
    with p = 6, written as (1−x)³·Σ_{k<p} C(k+2, 2)·x^k: their form sums terms of size 48, so in float32 it
    reaches the cutoff at ±1e-6; this one is zero there to the last bit, and so are its derivatives.
    """
    x = (distances / cutoff).clamp(max=1.0)
    series = torch.full_like(x, math.comb(_ENVELOPE_ORDER + 1, 2))
    for k in reversed(range(_ENVELOPE_ORDER - 1)):
        series = series * x + math.comb(k + 2, 2)
    return (1.0 - x) ** 3 * series


def envelope_slope(distances: Tensor, cutoff: float) -> Tensor:
    """(E,) derivative of `envelope` by the distance: −p(p+1)(p+2)/2 · x^(p−1) · (1−x)² / cutoff."""
    x = (distances / cutoff).clamp(max=1.0)
    p = _ENVELOPE_ORDER
    return (-0.5 * p * (p + 1) * (p + 2) / cutoff) * x ** (p - 1) * (1.0 - x) ** 2


def bessel_basis(distances: Tensor, cutoff: float, size: int) -> Tensor:
    """(E, size) spherical Bessel functions √(2/3)·sin(nπx)/x of x = d/cutoff, n = 1 … size (same paper).

    The factor gives each a mean square of 1 over neighbours that fill the sphere evenly, as a network wants
    its inputs; the paper's own √(2/cutoff)·sin(nπx)/d is six times smaller at 5 Å and learns more slowly.
    Distances (E,) in Å must be positive: two atoms on one spot are refused before a graph gets here.
    """
    n = torch.arange(1, size + 1, dtype=distances.dtype, device=distances.device)
    x = (distances / cutoff).unsqueeze(-1)
    return math.sqrt(2.0 / 3.0) * torch.sin(x * (math.pi * n)) / x


def bessel_slope(distances: Tensor, cutoff: float, size: int) -> Tensor:
    """(E, size) derivative of `bessel_basis` by the distance, in 1/Å."""
    n = torch.arange(1, size + 1, dtype=distances.dtype, device=distances.device) * math.pi
    x = (distances / cutoff).unsqueeze(-1)
    return math.sqrt(2.0 / 3.0) / cutoff * (n * torch.cos(x * n) - torch.sin(x * n) / x) / x
