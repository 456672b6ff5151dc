"""Expert gradients, prototypes and the Stein transform of a Megatron model."""
