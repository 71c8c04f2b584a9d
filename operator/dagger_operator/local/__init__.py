"""The runtime on one machine: observes and applies the planned objects as processes.

A small stand-in for a cluster, as far as the objects of `control` need one: Deployments and Jobs of pods, pods of processes,
Services, Secrets, probes, back-off, deadlines. It makes no decisions about a run.
"""
