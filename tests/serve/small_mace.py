"""Writes a small untrained MACE model, made by its own package, into the file that it is called with."""

import sys

import numpy as np
import torch
from e3nn import o3
from mace import modules

BLOCK = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]


def main(path: str) -> None:
    """Weights are random, and the same each time."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = modules.ScaleShiftMACE(
        r_max=4.0,
        num_bessel=4,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=BLOCK,
        interaction_cls_first=BLOCK,
        num_interactions=2,
        num_elements=3,
        hidden_irreps=o3.Irreps("8x0e+8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.array([-13.6, -1029.0, -2041.0]),
        avg_num_neighbors=8,
        atomic_numbers=[1, 6, 8],
        correlation=2,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    torch.save(model, path)


if __name__ == "__main__":
    main(sys.argv[1])
