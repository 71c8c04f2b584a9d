"""Who acts and who labels: mixing by deterministic coins, the policy gateway, teacher labels.

The gateway runs inside the rollout worker. Each rollout opens a session with a base URL and token of its own; any scaffold
that speaks the OpenAI API works with it unchanged.
"""
