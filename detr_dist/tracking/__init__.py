"""Tracking of runs: names of params and metrics, MLflow, TensorBoard and users' trackers."""
