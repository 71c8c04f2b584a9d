"""vLLM command lines, weights in and out, in-place policy updates, identity, preflight."""
