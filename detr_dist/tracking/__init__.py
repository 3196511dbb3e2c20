"""What is logged, under which name, and where it goes."""
