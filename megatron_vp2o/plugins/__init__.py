"""The Stein transform, losses and diagnostics inside other people's training loops (docs/plugins.md).

Nothing here imports a host (verl, slime, megatron.training) before the host itself has been started.
"""
