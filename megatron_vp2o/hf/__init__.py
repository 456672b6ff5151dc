"""Hugging Face checkpoints: their files, and how each model family's tensors correspond to Megatron's.

Torch and files only: nothing here imports megatron.core or joins a process group. What needs live models is in
`megatron_vp2o/megatron/hf/`.
"""
