"""Data, training and export."""
