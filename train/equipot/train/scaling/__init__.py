"""Scaling studies: grids of training runs, the laws that fit their errors, and a report of what they say."""
