"""The run, its loop, and what the loop steps and saves."""
