"""The command line: run, validate, status, resume, store, export."""
