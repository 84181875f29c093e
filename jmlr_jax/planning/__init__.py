"""Plans of training for a TPU slice, made by its compiler on any machine."""
