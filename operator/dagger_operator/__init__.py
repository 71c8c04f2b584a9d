"""DAgger for LLM agents: from a `DAggerRun` in YAML to a better student.

Rooms, each leaning only on those before it: `api`, `store`, `policy`, `sandbox`, `tasks`, `rollout`, `training`,
`evaluation`, `serving`, `control`, `local`, `cluster`, `cli`. The `__init__` docstring of each says what it is for.
"""

__version__ = "0.1.0"
