"""DDP, optimizer, schedule and micro-batches."""
