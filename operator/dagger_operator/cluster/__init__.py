"""The operator: observes the cluster and applies what `control` plans; the counterpart of `local`."""
