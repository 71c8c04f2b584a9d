"""Dashboards for Grafana as code: `make generate` writes them for the chart, from docs/metrics.md's metrics.

What is drawn is data here (`Graph`, `Number`, `Table`); grafana-foundation-sdk makes Grafana's JSON of it, in `drawing`.
"""
