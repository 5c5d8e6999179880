"""Potentials that are no bundles of ours: any ASE calculator, CHGNet, MACE, each in a process of its own."""
