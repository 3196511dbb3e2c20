"""What is done with a trained detector: evaluate it on any data, find objects with it, export it."""
