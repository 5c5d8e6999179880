"""Structures that move on the server: relaxations by ASE's algorithms, in batches with everybody's."""
