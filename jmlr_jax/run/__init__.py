"""A run directory: artifacts, phases, weights, indexes and candidate tables."""
