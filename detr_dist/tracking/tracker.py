"""What is logged, under which names; the main process's trackers and the files that go with them."""

import platform
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker

from detr_dist.config import Config
from detr_dist.data.coco import CocoData
from detr_dist.data.loading import num_loader_processes
from detr_dist.models.detector import Detector
from detr_dist.redaction import redact_value


def tensorboard_tracker(output_dir: Path, *, first_step: int) -> TensorBoardTracker:
    """Writes event files to `output_dir`/tensorboard; what earlier files hold after `first_step` is
    hidden."""
    tracker = TensorBoardTracker("tensorboard", output_dir, purge_step=first_step + 1 if first_step else None)
    tracker.start()
    return tracker


def run_params(
    config: Config, detector: Detector, train: CocoData, val: CocoData, num_processes: int
) -> dict[str, Any]:
    """Parameters of a run, with the names that MLflow shows."""
    training, model, data = config.training, config.model, config.data
    network_config = detector.network.config
    backbone = (
        model.backbone if isinstance(model.backbone, str) else model.backbone.get("model_type", "custom")
    )
    params = {
        "batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "learning_rate_backbone": training.learning_rate_backbone,
        "num_epochs": training.num_epochs,
        "max_steps": training.max_steps,
        "weight_decay": training.weight_decay,
        "gradient_clip": training.gradient_clip,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "mixed_precision": training.mixed_precision,
        "tf32": training.tf32,
        "deterministic": training.deterministic,
        "compile_model": training.compile_model,
        "channels_last": training.channels_last,
        "gradient_checkpointing": training.gradient_checkpointing,
        "lr_schedule": training.lr_schedule,
        "warmup_steps": training.warmup_steps,
        "seed": training.seed,
        "model_architecture": model.model_architecture,
        "backbone": backbone,
        "pretrained": model.pretrained,
        "pretrained_backbone": model.pretrained_backbone,
        "num_classes": len(train.class_names),
        "class_names": ", ".join(train.class_names),
        "hidden_dim": network_config.hidden_size,
        "num_encoder_layers": network_config.encoder_layers,
        "num_decoder_layers": network_config.decoder_layers,
        "num_queries": detector.num_queries,
        "dropout": network_config.dropout,
        "train_samples": len(train),
        "val_samples": len(val),
        "num_workers": num_loader_processes(data.num_workers),
        "prefetch_factor": data.prefetch_factor,
        "augmentation": data.augmentation,
        "group_by_shape": data.group_by_shape,
        "canvas_multiple": data.canvas_multiple,
        "shortest_edge": data.shortest_edge,
        "longest_edge": data.longest_edge,
        "num_processes": num_processes,
        "global_batch_size": training.batch_size * num_processes * training.gradient_accumulation_steps,
        "python_version": platform.python_version(),
    }
    return {name: redact_value(value) for name, value in params.items() if value is not None}
