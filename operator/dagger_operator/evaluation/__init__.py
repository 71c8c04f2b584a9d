"""Greedy rollouts of one policy on the held-out tasks, and the statistics that compare policies."""
