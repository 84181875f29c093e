"""Models. The rest of the project goes through :mod:`jmlr_jax.nn.functional`."""
