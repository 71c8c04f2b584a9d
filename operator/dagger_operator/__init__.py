"""DAgger for LLM agents: from a `DAggerRun` in YAML to a better student.

Rooms, each depending only on those before it: `api`, `store`, `kube`, `estimate`, `sandbox`, `training`, `serving`, `control`, `tasks`,
`policy`, `rollout`, `evaluation`, `local`, `cluster`, `cli`. The `__init__` docstring of each describes its purpose.
"""

__version__ = "0.1.0"
