"""Trains detection transformers on COCO data, on one process or many, tracked in MLflow."""

__version__ = "0.1.0"
