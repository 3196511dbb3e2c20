"""The report before a run's first step: devices, split into steps, sizes, and findings on the data."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

import torch.distributed as dist
from torch import Tensor

from detr_dist.config import FROM_ENVIRONMENT, Config, specific_tiles
from detr_dist.data.box_sizes import CheckSettings
from detr_dist.data.checks import check_boxes
from detr_dist.data.columns import counted
from detr_dist.data.concatenation import parts_of
from detr_dist.data.repeat_factors import describe_samples
from detr_dist.resize import Resize
from detr_dist.serving.network import keeps_timm_norms
from detr_dist.training.loop import Training, TrainState
from detr_dist.training.setup import Setup

_MIB = 2**20


def describe_run(setup: Setup) -> Iterator[str]:
    """Yield lines on data, processes and devices, and the sizes of a step and of a checkpoint."""
    yield from _describe_data(setup)
    yield from _describe_processes(setup)
    if setup.config.logging.mlflow:
        yield from ignored_variables(setup.config)
    plan = setup.plan
    left_out = f" ({plan.num_dropped} images of each left out)" if plan.num_dropped else ""
    yield (
        f"batch {plan.batch_size} x {counted(plan.num_processes, 'process')} x accumulation "
        f"{plan.accumulation} = {counted(plan.global_batch_size, 'image')} a step; "
        f"{counted(plan.steps_per_epoch, 'step')} an epoch{left_out}, "
        f"{counted(setup.total_steps, 'step')} in all"
    )
    if setup.config.training.warmup_steps >= setup.total_steps:
        yield (
            f"training.warmup_steps {setup.config.training.warmup_steps}: the learning rate does not reach "
            "its peak in this run"
        )
    if keeps_timm_norms(setup.detector.network):
        yield (
            f"model.backbone {setup.config.model.backbone}: transformers itself leaves out its "
            "activations; load the model with detr-dist or MLflow, not with from_pretrained"
        )
    yield _describe_sizes(setup)


def ignored_variables(config: Config) -> Iterator[str]:
    """Yield a line for each environment variable that is ignored because the setting has another value."""
    for key, default in FROM_ENVIRONMENT.items():
        if default.value not in (None, getattr(config.logging, key)):
            yield (
                f"logging.{key} is {getattr(config.logging, key)}, as set or as in the resumed run; "
                f"{default.variable}={default.value} is ignored"
            )


def describe_resumption(setup: Setup, training: Training, state: TrainState) -> Iterator[str]:
    """Yield lines on the step at which training resumes, and on changes since it was saved."""
    if setup.resumed is None:
        return
    yield (
        f"resuming from {setup.resumed.folder} at step {state.step}, "
        f"{state.step * training.plan.global_batch_size} samples seen"
    )
    yield from (f"  changed since: {change}" for change in setup.changes)
    if training.is_over(state):
        limit = "training.num_epochs or training.max_steps"
        if state.closed_step < training.total_steps:
            limit = "training.early_stopping_patience"
        yield f"there is nothing left to do: raise {limit} to continue"


def _describe_data(setup: Setup) -> Iterator[str]:
    train_data, val_data = setup.train_data, setup.val_data
    detector = setup.detector
    finest_stride = detector.family.finest_stride(detector.network.config)
    tiles = specific_tiles(setup.config)
    settings = CheckSettings(Resize.of(setup.config.data), detector.num_queries, finest_stride, tiles)
    sources = parts_of(train_data)
    if val_data.annotations_path.resolve() in {each.annotations_path.resolve() for each in sources}:
        yield (
            "warning: --train-dir and --val-dir are the same data: the validation metrics do not show "
            "how the model works on other images"
        )
    for split in (*sources, val_data):
        yield from split.notices
        findings = split.computed_once(repr(settings), partial(check_boxes, split, settings))
        yield from (f"{split.annotations_path}: {finding}" for finding in findings)
    yield (
        f"{len(train_data)} images to train on, {len(val_data)} to validate; classes: "
        f"{', '.join(train_data.class_names)}"
    )
    yield from describe_samples(train_data, setup.config, setup.samples)
    if setup.windows is not None:
        yield setup.windows


def _describe_processes(setup: Setup) -> Iterator[str]:
    """Yield a line for all processes, and a line for each node if there are several processes."""
    places, precision = setup.places, f"precision {setup.config.training.mixed_precision}"
    if len(places) == 1:
        yield f"1 process on {places[0].host} ({places[0].device}), {precision}"
        return
    num_nodes = len(setup.host_names)
    strategy = f"ZeRO-{setup.strategy.zero_stage}" if setup.strategy.zero_stage else "DDP"
    yield (
        f"{len(places)} processes (world size {len(places)}) on {num_nodes} "
        f"node{'s' * (num_nodes > 1)}, {strategy} over {dist.get_backend()}, {precision}"
    )
    by_host = sorted(enumerate(places), key=lambda entry: (entry[1].host, entry[0]))
    for host, entries in groupby(by_host, key=lambda entry: entry[1].host):
        of_host = [f"{rank} on {place.device}" for rank, place in entries]
        yield f"  {host}: rank {', '.join(of_host)}"


def _describe_sizes(setup: Setup) -> str:
    """Describe the sizes of network, checkpoint and model.

    AdamW has two moments for each trained value; a model is saved twice, for MLflow and for transformers.
    """
    network = setup.detector.network
    weights = _num_bytes(network.state_dict().values())
    learning = _num_bytes(p for p in network.parameters() if p.requires_grad)
    checkpoint = weights * (2 if setup.config.training.ema_decay else 1) + 2 * learning
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return (
        f"{num_parameters / 1e6:.1f} million parameters; a checkpoint takes about "
        f"{checkpoint / _MIB:.0f} MiB, a model {2 * weights / _MIB:.0f} MiB"
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
