"""Distribution of weights and optimizer over the processes of a run, hidden from the loop.

Every process holds all of them (one process, or DDP), or DeepSpeed's ZeRO partitions optimizer, gradients and
weights, and they are gathered when necessary. A checkpoint of a ZeRO run is like every other: complete, of
ordinary tensors, and usable with any number of processes and any stage. DeepSpeed's own format, which can run
code when it is loaded, is never written or read.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from detr_dist.config import TrainingConfig
from detr_dist.environment import uses_deepspeed
from detr_dist.errors import UsageError
from detr_dist.models.average import WeightAverage
from detr_dist.models.denoising import denoising_queries
from detr_dist.models.detector import Detector

OptimizerMemory = dict[int, dict[str, Any]]
"""The optimizer state of each parameter, by the parameter's position in its groups."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides the number of steps."""

BUCKET_ELEMENTS = 10_000_000
"""Float32 numbers in one message, and gathered at a time under ZeRO-3. DeepSpeed's defaults are for language
models: a buffer of 2 GB for gradients would take more memory than ZeRO saves for a DETR."""

OURS_ALONE = ("bf16", "fp16", "torch_autocast", "optimizer", "scheduler")
"""Sections of DeepSpeed's configuration for settings that our configuration has."""


class Replicated:
    """Every process holds all weights and the complete optimizer: one process, or DDP."""

    zero_stage = 0

    def average(self, trained: Detector, decay: float, warmup_steps: int = 0) -> WeightAverage:
        """Build the moving average of the weights."""
        return WeightAverage(trained, decay, warmup_steps)

    def prepare(
        self, accelerator: Accelerator, detector: Detector, optimizer: Optimizer
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Return the wrapped detector, and its optimizer with its state. Collective."""
        model, prepared = accelerator.prepare(detector, optimizer)
        if isinstance(model, DistributedDataParallel):
            # Buffers need not be sent in each forward pass: most are constants, and batch-norm statistics
            # matter only in evaluation, which uses the main process's (HostGroup.synchronise_buffers). As an
            # argument of DDP this causes a warning (torch 2.14), and no buffers are sent at the start either.
            model.broadcast_buffers = False
            _settle_order_of_sums(model, detector, accelerator.device)
        return model, prepared

    @contextmanager
    def whole(self) -> Iterator[OptimizerMemory | None]:
        """Gather all weights in the main process's detector within the block. Collective.

        Yields the optimizer state there, or None if the optimizer itself has all of it.
        """
        yield None


def _settle_order_of_sums(model: DistributedDataParallel, detector: Detector, device: torch.device) -> None:
    """Run forward and backward once, and discard the gradients. Collective.

    DDP rearranges its gradient buckets after the first backward pass, and the position of a gradient decides
    the order in which more than two processes sum it. Without this, the first step of a resumed run would be
    rounded differently from that of an uninterrupted run. As in training, every parameter gets a gradient.
    """
    for module in model.train().modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # keeps its statistics unchanged
    edge, nothing = detector.trial_edge, (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), [0])
    image = torch.zeros(1, 3, edge, edge, dtype=torch.uint8, device=device)
    denoising = None
    if detector.denoising is not None:
        denoising = denoising_queries(detector.denoising, *nothing, [np.random.default_rng()]).to(device)
    with torch.compiler.set_stance("force_eager"):  # no other image has this size
        outputs = model(image, torch.tensor([[edge, edge]], device=device), True, denoising)
    torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    model.zero_grad()
    model.train()


def strategy_for(accelerator: Accelerator) -> Replicated:
    """Return the strategy for the Accelerator's kind of distribution."""
    plugin = accelerator.deepspeed_plugin
    return Replicated() if plugin is None else Zero(plugin.zero_stage)


class Zero(Replicated):
    """Stage 1 partitions the optimizer, stage 2 also the gradients, stage 3 also the weights."""

    def __init__(self, stage: int) -> None:
        self.zero_stage = stage

    def average(self, trained: Detector, decay: float, warmup_steps: int = 0) -> WeightAverage:
        """Build the moving average; under stage 3 one that gathers the weights."""
        kind = GatheringAverage if self.zero_stage == 3 else WeightAverage
        return kind(trained, decay, warmup_steps)

    def prepare(
        self, accelerator: Accelerator, detector: Detector, optimizer: Optimizer
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Return DeepSpeed's engine, and its optimizer with its state. Collective."""
        self._detector, self._is_main_process = detector, accelerator.is_main_process
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        memory = dict(optimizer.state)  # the complete state, which DeepSpeed would ignore
        optimizer.state.clear()
        # DeepSpeed uses functions by names that torch has deprecated.
        warnings.filterwarnings("ignore", "`torch.distributed.*_tensor` is deprecated", FutureWarning)
        model, prepared = accelerator.prepare(detector, optimizer)
        self._sharded = prepared.optimizer  # DeepSpeed's
        self._scatter(memory)
        return model, prepared

    @contextmanager
    def whole(self) -> Iterator[OptimizerMemory | None]:
        """Gather all weights, and yield the complete optimizer state on the main process. Collective."""
        memory = self._gather()
        with gathered(self._detector):
            yield memory

    @property
    def _stepped(self) -> Optimizer:
        """The optimizer that makes the steps, on this process's flat parts of all weights."""
        return cast(Optimizer, self._sharded.optimizer)

    def _scatter(self, memory: dict[Tensor, dict[str, Tensor]]) -> None:
        """Give each process's optimizer its part of the complete state, which is empty in a new run.

        By default DeepSpeed creates the state in the first step. That is too late to restore it, and stages 1
        and 2 then lose the state of all parameter groups but the first.
        """
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        step = next((float(of_parameter["step"]) for of_parameter in memory.values()), 0.0)
        if self.zero_stage == 3:
            parts = self._sharded.fp32_partitioned_groups_flat
        else:
            parts = self._sharded.single_partition_of_fp32_groups
        for part in parts:
            self._stepped.state[part] = {name: torch.zeros_like(part) for name in MOMENTS}
            is_fused = self._stepped.defaults["fused"]
            self._stepped.state[part]["step"] = torch.tensor(step, device=part.device if is_fused else "cpu")
        if self.zero_stage < 3:
            self._sharded._lazy_init_hp_params_optimizer_state()
        for parameter, of_parameter in memory.items():
            for name in MOMENTS:
                if (
                    self.zero_stage == 3
                ):  # DeepSpeed's call for full tensors fails if parts have different sizes
                    safe_set_local_optimizer_state(parameter, _own_part(parameter, of_parameter[name]), name)
                else:
                    safe_set_full_optimizer_state(parameter, of_parameter[name], name)

    def _gather(self) -> OptimizerMemory:
        """Return the complete optimizer state, in host memory of the main process.

        Gathers one tensor at a time, so that the device needs memory for only one.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        memory: OptimizerMemory = {}
        step = float(next(iter(self._stepped.state.values()))["step"])
        for index, parameter in enumerate(self._parameters):
            moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            if self._is_main_process:
                memory[index] = {name: moment.cpu() for name, moment in moments.items()}
                memory[index]["step"] = torch.tensor(step)
        return memory


class GatheringAverage(WeightAverage):
    """The average under ZeRO-3, a separate complete detector even if nothing is averaged.

    A partitioned detector requires all processes to compute at the same time, but in an evaluation they have
    different numbers of batches. If nothing is averaged, the copy stays on the host while it is not in use.
    """

    def __init__(self, trained: Detector, decay: float, warmup_steps: int = 0) -> None:
        super().__init__(trained, decay, warmup_steps)
        self._device = next(trained.parameters()).device
        if not decay:
            self.detector = copy.deepcopy(trained).requires_grad_(False).cpu()

    def update(self, step: int) -> None:
        """Update the average with the gathered weights. Collective."""
        if self.decay:
            with gathered(self._trained):
                super().update(step)

    @contextmanager
    def current(self) -> Iterator[Detector]:
        """Yield the averaged or gathered detector, ready to predict within the block. Collective."""
        if not self.decay:
            with gathered(self._trained):
                self.detector.load_state_dict(self._trained.state_dict())
            self.detector.to(self._device)
        yield self.detector
        if not self.decay:
            self.detector.cpu()


def gathered(detector: Detector) -> AbstractContextManager[None]:
    """Gather all weights on every process within the block; only ZeRO-3 has anything to do. Collective."""
    from deepspeed.runtime.zero import GatheredParameters

    return cast(AbstractContextManager[None], GatheredParameters(detector.parameters()))


def _own_part(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return this process's part of a tensor that belongs to a parameter of ZeRO-3; the last are padded."""
    sharded = cast(Any, parameter)
    size, process = sharded.ds_tensor.numel(), torch.distributed.get_rank(sharded.ds_process_group)
    part = whole.flatten()[process * size : (process + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))


def synchronise_batch_norm(network: nn.Module) -> None:
    """Let trained batch norm use the images of all processes; names in the state dict stay the same."""
    from timm.layers.norm_act import convert_sync_batchnorm  # slow to import, and needed only here

    convert_sync_batchnorm(network)  # torch's own would drop the activations in timm's batch norm


def zero_plugin(settings: TrainingConfig, num_processes: int) -> DeepSpeedPlugin | None:
    """Return DeepSpeed's settings: stage and offloading from the launcher, the rest from our configuration.

    Returns None without DeepSpeed.

    Raises:
        UsageError: the two contradict each other, or ZeRO does not support a setting.
    """
    if not uses_deepspeed():
        return None
    try:
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    except (ValueError, OSError) as error:
        raise UsageError(f"DeepSpeed's settings cannot be used: {' '.join(str(error).split())}") from None
    given = plugin.deepspeed_config
    _check_feasible(plugin, settings)
    _check_agreement(given, settings, num_processes)
    given["train_micro_batch_size_per_gpu"] = settings.batch_size
    given["train_batch_size"] = settings.batch_size * settings.gradient_accumulation_steps * num_processes
    given["gradient_accumulation_steps"] = settings.gradient_accumulation_steps
    given["gradient_clipping"] = settings.gradient_clip
    for name in OURS_ALONE:
        given.pop(name, None)
    # With offloading DeepSpeed would use its own AdamW, which it has to compile; torch's works as well.
    given["zero_force_ds_cpu_optimizer"] = False
    if settings.mixed_precision == "bf16":
        # As with DDP, weights, gradients and sums over processes stay float32.
        given["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    sizes = ["reduce_bucket_size", "allgather_bucket_size"]
    if plugin.zero_stage == 3:
        sizes += ["stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"]
    # Accelerate would compute an "auto" from the width of a language model.
    chosen = {name: value for name, value in given["zero_optimization"].items() if value != "auto"}
    given["zero_optimization"] = dict.fromkeys(sizes, BUCKET_ELEMENTS) | chosen
    return plugin


def _check_feasible(plugin: DeepSpeedPlugin, settings: TrainingConfig) -> None:
    if plugin.zero_stage not in (1, 2, 3):
        raise UsageError(
            f"DeepSpeed with ZeRO stage {plugin.zero_stage}: 1, 2 and 3 are supported; stage 0 is what "
            "accelerate_configs/multi_gpu.yaml does"
        )
    if "nvme" in (plugin.offload_optimizer_device, plugin.offload_param_device):
        raise UsageError("DeepSpeed's offloading to nvme is not supported; offload to cpu, or nothing")
    if settings.mixed_precision == "fp16":
        raise UsageError("training.mixed_precision=fp16 is not supported with DeepSpeed; use bf16 or no")
    if settings.compile_model and plugin.zero_stage == 3:
        raise UsageError(
            "training.compile_model=true is not supported with ZeRO stage 3, which partitions the weights; "
            "set it to false, or use stage 1 or 2"
        )


def _check_agreement(given: dict[str, Any], settings: TrainingConfig, num_processes: int) -> None:
    """Refuse contradictions; Accelerate fills in "auto" for missing values, and 1 for the accumulation."""
    per_step = settings.batch_size * settings.gradient_accumulation_steps * num_processes
    pairs = {
        "gradient_clipping": ("training.gradient_clip", settings.gradient_clip),
        "train_micro_batch_size_per_gpu": ("training.batch_size", settings.batch_size),
        "train_batch_size": ("training.batch_size x accumulation x processes", per_step),
    }
    if given.get("gradient_accumulation_steps") != 1:
        ours = settings.gradient_accumulation_steps
        pairs["gradient_accumulation_steps"] = ("training.gradient_accumulation_steps", ours)
    for name, (key, value) in pairs.items():
        if given.get(name, "auto") not in ("auto", value):
            raise UsageError(
                f"{name} is {given[name]} for DeepSpeed, but {key} is {value}; make them agree or remove it "
                "from DeepSpeed's settings"
            )
    for name in OURS_ALONE:
        section = given.get(name)
        is_off = isinstance(section, dict) and str(section.get("enabled")).lower() in ("false", "auto")
        if section is not None and not is_off:
            raise UsageError(
                f"DeepSpeed's configuration has a section {name}, for which the training configuration is "
                "used; remove it from DeepSpeed's"
            )
