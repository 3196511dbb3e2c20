"""What a trained model is used for: evaluate it on any data, find objects with it, export it."""
