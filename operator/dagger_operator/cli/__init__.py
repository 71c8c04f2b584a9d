"""The command line: run, validate, status, resume, compare, store, export."""

from dagger_operator.cli.app import main

__all__ = ["main"]
