"""Building Megatron's GPTModel with our modules in it."""
