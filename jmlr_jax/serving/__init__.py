"""`jmlr serve`: a local web page and a small JSON API over the answering engine. Needs the extra ``serve``."""
