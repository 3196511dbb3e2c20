"""The network, the matcher, the criterion, and from outputs to detections."""
