"""Variational Proximal Policy Optimization for sparse Mixture-of-Experts models on Megatron-Core."""

__version__ = "0.1.0"
