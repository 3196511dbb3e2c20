"""Checkpoints on disk: written beside their final name and renamed when whole."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from detr_dist.config import Config
from detr_dist.models.detector import Detector
from detr_dist.training.loop import Training
from detr_dist.training.state import TrainState


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` (and the place of what had it) only when it is
    whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.replace(replaced)
    partial.replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    *,
    detector: Detector,
    training: Training,
    state: TrainState,
    config: Config,
    facts: dict[str, Any],
) -> None:
    """Write everything that training goes on from. Main process only; `facts` go into `state.json` as they
    are."""
    with new_folder(folder) as partial:
        save_model(detector.network, str(partial / "model.safetensors"))
        torch.save(
            {
                "optimizer": training.optimizer.state_dict(),
                "scheduler": training.scheduler.state_dict(),
                "scaler": training.accelerator.scaler.state_dict() if training.accelerator.scaler else None,
            },
            partial / "optimizer.pt",
        )
        text = json.dumps(asdict(state) | facts | {"config": config.model_dump(mode="json")}, indent=2)
        (partial / "state.json").write_text(text + "\n")
