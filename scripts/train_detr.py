#!/usr/bin/env python3
"""Train a detector: the same as `detr-dist train`, as a script for `accelerate launch` and `torchrun`."""

import sys

from detr_dist.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
