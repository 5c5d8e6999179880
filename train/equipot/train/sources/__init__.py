"""Readers: one per release format. Each turns a file into frames in canonical units."""
