"""The commands of `fedfrom`, one a file; `fedfrom.cli` runs them."""
