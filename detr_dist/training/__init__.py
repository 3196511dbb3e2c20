"""Training runs: their set-up, the loop, optimizer, checkpoints and output."""
