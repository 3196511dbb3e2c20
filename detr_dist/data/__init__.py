"""From COCO annotations and images on disk to batches on the device."""
