"""Where untrusted commands run: one interface, several kinds of sandbox (a local process here; a pod on a cluster)."""
