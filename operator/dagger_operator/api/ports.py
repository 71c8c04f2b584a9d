"""Where the containers of a run's pods listen: what they open and what others are told is one number."""

AGENT_PORT = 8000
"""The policy agent, in front of vLLM."""
GATEWAY_PORT = 8090
"""The policy gateway: open to sandbox pods of command scaffolds; the chart's network policies name it."""
METRICS_PORT = 9090
"""What Prometheus scrapes of a stage."""
TORCH_PORT = 29500
"""Where the first node of a training gathers its ranks."""
VLLM_MASTER_PORT = 29501
"""Where the first node of a served replica gathers the others."""
