"""What is kept, where, and in which form: object storage, trajectories, claims, round manifests, aggregation.

Everything between stages goes through one prefix of an object store. Shards are content-addressed, manifests and results
are created once, claims are taken by conditional writes; no database.
"""
