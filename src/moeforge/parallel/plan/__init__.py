"""What a training step costs on a cluster that need not be at hand: memory, bytes, time, and the best mesh."""
