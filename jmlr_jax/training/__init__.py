"""The training loop of one phase and what surrounds it."""
