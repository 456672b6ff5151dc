"""The embedded rollout engine."""
