"""Serves bundles over gRPC: structures in, energies, forces and stress out."""
