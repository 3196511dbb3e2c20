"""Train like `detr-dist train`, but let the last process run out of device memory at its third batch.

There is no such device here: the error is torch's own, raised by hand.
"""

import os
import sys

import torch

from detr_dist.cli import main as run_command
from detr_dist.models.detector import Detector

num_batches = 0


def main() -> None:
    forward = Detector.forward

    def short_of_memory(self: Detector, *args: object) -> object:
        global num_batches
        num_batches += 1
        if os.environ["RANK"] == "1" and num_batches == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *args)

    Detector.forward = short_of_memory
    run_command(sys.argv[1:])


if __name__ == "__main__":
    main()
