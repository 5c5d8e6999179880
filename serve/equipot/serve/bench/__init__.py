"""Measures a running server under load. Knows of the server what any client does, and its process."""
