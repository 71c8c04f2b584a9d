"""The operator: observes and applies on Kubernetes what `control` plans; the twin of `local`."""
