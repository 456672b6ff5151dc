"""Versions of Megatron-Core, the CPU stand-in, process groups."""
