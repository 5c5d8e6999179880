"""Other programs that move atoms, driven by an equipot server. Each module imports nothing of its program."""
