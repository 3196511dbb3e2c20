"""From detections to COCO figures, over all processes."""
