"""The rollout worker: claims rollouts, runs the scaffold against sandbox and gateway, writes trajectories and closes the round."""
