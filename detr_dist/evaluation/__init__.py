"""From a detector and a data set to metrics, plots and files of detections, over all processes."""
