"""How an API server is spoken to, by the operator and by workers."""
