"""Stored data and its formats: object storage, trajectories, claims, round manifests, aggregation.

Stages exchange data only through one prefix of an object store. Shards are content-addressed, manifests and results are created once,
claims are taken by conditional writes; there is no database.
"""
