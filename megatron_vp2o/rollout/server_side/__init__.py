"""What a vLLM server loads, in its own environment; this folder is on its PYTHONPATH."""
