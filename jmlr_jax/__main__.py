"""``python -m jmlr_jax`` is ``jmlr``."""

from jmlr_jax.cli import main

raise SystemExit(main())
