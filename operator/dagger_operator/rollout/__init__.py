"""The worker: claims rollouts, runs the scaffold against sandbox and gateway, writes trajectories, closes the round."""
