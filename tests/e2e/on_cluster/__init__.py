"""Runs on a real cluster with the chart installed: a package, so that the chart goes when its tests are over."""
