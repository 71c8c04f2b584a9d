"""Who acts and who labels: mixing by deterministic coins, the policy gateway, teacher labels.

The gateway runs inside the rollout worker. Each rollout opens a session with its own base URL and token; any scaffold that uses
the OpenAI API works with it unchanged.
"""
