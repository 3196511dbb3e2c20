"""The section `training` of the configuration. Imports no torch."""

from typing import Literal

from pydantic import Field

from detr_dist.config_types import (
    Count,
    CountOrZero,
    Factor,
    Names,
    Positive,
    PositiveOrZero,
    Precision,
    Probability,
    Section,
    Seed,
    Share,
)


class TrainingConfig(Section):
    """Batches, schedule, optimizer, precision, speed and memory."""

    batch_size: Count = 4
    """Images per process and micro-batch."""
    num_epochs: Count = 300
    """Passes over the training images."""
    max_steps: Count | None = None
    """End after this many optimizer steps if they are reached before `num_epochs`; the learning-rate schedule
    still spans `num_epochs`, so that a run that is ended early and resumed equals an uninterrupted one."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of everything but the backbone."""
    learning_rate_backbone: PositiveOrZero = 1e-5
    """Peak learning rate of the backbone; 0 freezes it."""
    learning_rate_decoder_factor: Factor = 1.0
    """The decoder's learning rate as a fraction of `learning_rate`, e.g. 0.7 as published for LW-DETR and
    RF-DETR."""
    weight_decay: PositiveOrZero = 1e-4
    """AdamW's decoupled decay; norms, biases, and a ViT backbone's position embeddings and tokens are left
    out."""
    layer_decay: Factor = 1.0
    """Factor on the learning rate from each layer of the backbone to the one before it, e.g. 0.8 for a ViT,
    whose embeddings then learn most slowly; 1: all layers have `learning_rate_backbone`."""
    gradient_clip: PositiveOrZero = 0.1
    """Largest L2 norm of all gradients together; 0 does not clip."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per process and optimizer step."""
    mixed_precision: Precision = "auto"
    """Autocast precision of the network; the loss is always computed in float32. `auto`: the precision given
    to accelerate launch, else bf16 if the GPU computes it natively, else no."""
    tf32: bool = True
    """Let a GPU round the factors of float32 convolutions and matrix products to TF32, which is faster;
    `false` keeps them exact. No effect on the CPU."""
    deterministic: bool = False
    """Choose deterministic algorithms where torch has them, which can be slower; on a GPU a warning names
    operations without one. The CPU is always deterministic."""
    compile_model: bool = False
    """Compile backbone and layers with torch.compile: takes minutes before the first step, then steps are
    faster."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, slower steps."""
    try_largest_batch: bool = True
    """On a GPU, compute the largest batch of the run once before the first step, so that a lack of memory
    shows at once. Changes no result."""
    channels_last: bool = False
    """Keep images and convolution weights in channels-last memory order."""
    seed: Seed = 42
    """Decides initial weights, order of samples, augmentation and dropout."""
    lr_schedule: Literal["step", "cosine", "flat_cosine", "constant"] = "step"
    """After the warm-up: `step` divides by 10 after two thirds of all steps, `cosine` falls to 0, `constant`
    stays. `flat_cosine` stays for `lr_flat_share` of all steps, then falls to `lr_final_factor` of the peak,
    and keeps that in the epochs of `data.augmentation_off_epochs`."""
    lr_flat_share: Share = 0.5
    """Fraction of all steps, 0 to 1, that `flat_cosine` spends in the warm-up and at the peak."""
    lr_final_factor: Share = 0.5
    """The final learning rate of `flat_cosine`, as a fraction of the peak."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps over which the learning rate rises to its peak."""
    warmup: Literal["linear", "quadratic"] = "linear"
    """How it rises; `quadratic` is slower at first."""
    sync_batch_norm: bool = False
    """With several processes on GPUs, let trained batch norm use the images of all processes in a micro-batch
    instead of each process's own."""
    ema_decay: Probability = 0.0
    """Decay of the moving average of the weights that is evaluated and saved, e.g. 0.9998; lower in the first
    steps; 0 does not average."""
    ema_warmup_steps: CountOrZero = 0
    """Steps over which the decay approaches `ema_decay`, as decay * (1 - exp(-step / N)); 0: faster, as
    min(decay, 1 - (1 + step)^(-2/3))."""
    early_stopping_patience: CountOrZero = 0
    """End after this many evaluations in a row without a better `val_map`; 0 turns this off."""
    extensions: Names = Field([])
    """Your own modules, by dotted name or as `file.py`, that every process imports before it trains: they
    register transforms, loss terms and families."""
    callbacks: Names = Field([])
    """Your own `Callback` classes, as `package.module.Name` or `file.py:Name`."""
