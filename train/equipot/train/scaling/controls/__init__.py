"""What the scaling study compares the architectures with, and nobody is to serve."""
