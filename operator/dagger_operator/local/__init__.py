"""The same run on one machine: observes and applies the planned objects as processes."""
