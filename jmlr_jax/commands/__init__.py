"""What the commands of `jmlr` do."""
