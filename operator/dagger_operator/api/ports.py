"""Ports of the containers of a run's pods: what listens and what connects use the same constants."""

AGENT_PORT = 8000
"""The policy agent, in front of vLLM."""
GATEWAY_PORT = 8090
"""The policy gateway: open to sandbox pods of command scaffolds; the chart's network policies name it."""
METRICS_PORT = 9090
"""A stage's metrics, scraped by Prometheus."""
TORCH_PORT = 29500
"""Rendezvous of the ranks of a training, on its first node."""
VLLM_MASTER_PORT = 29501
"""Rendezvous of the nodes of a served replica, on its first node."""
