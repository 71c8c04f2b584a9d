"""LeaderWorkerSet and Kueue as they are: a package, so that their control plane ends with its tests."""
