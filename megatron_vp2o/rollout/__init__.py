"""Where rollouts come from: the protocol of engines, vLLM servers, and how weights reach them. Blind to Megatron."""
