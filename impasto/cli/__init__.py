"""The command line: one file a verb. `main` is the program's entry."""

from impasto.cli.app import main

__all__ = ["main"]
