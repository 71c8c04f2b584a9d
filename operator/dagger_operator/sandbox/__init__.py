"""Where untrusted commands run: one interface, two kinds of sandbox (local processes, or pods on a cluster)."""
