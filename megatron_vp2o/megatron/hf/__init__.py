"""A live or stored Megatron model and Hugging Face."""
