"""Access to an API server, for the operator and for workers."""
