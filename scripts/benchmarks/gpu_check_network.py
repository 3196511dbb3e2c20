"""Steps of gpu_check.py that measure the network: speed, memory, precision and host-device synchronisations.

On a GPU it is the network of configs/training.yaml with random weights instead of ImageNet weights. On the
CPU it is a tiny network, for which speed proves nothing.
"""

import collections
import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import train_step as taken_apart
from gpu_check_findings import Check
from loader import write_data, write_photos
from timing import median_ratio, medians, seconds_of, take_turns
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from detr_dist.config import Config, load_config
from detr_dist.data.coco import load_data
from detr_dist.data.synthetic import make_data
from detr_dist.distributed import group_of_processes
from detr_dist.serving.precision import autocast, set_numerics

TF32, FLOAT32 = (
    ["training.mixed_precision=no", "training.tf32=true"],
    ["training.mixed_precision=no", "training.tf32=false"],
)
DEFORMABLE = [
    "training.mixed_precision=bf16",
    "training.batch_size=2",
    "model.model_architecture=deformable_detr",
    "model.num_queries=300",
]
SMALL = [  # for the CPU, and for runs that only compare losses
    "data.shortest_edge=64",
    "data.longest_edge=96",
    "model.backbone={model_type: resnet, layer_type: basic, embedding_size: 16, "
    "hidden_sizes: [16, 16, 32, 32], depths: [1, 1, 1, 1], out_features: [stage4]}",
    "model.pretrained_backbone=false",
    "model.freeze_batch_norm=true",
    "model.hidden_dim=32",
    "model.num_encoder_layers=1",
    "model.num_decoder_layers=2",
    "model.num_queries=40",
]
PEAK_TFLOPS = {  # dense, from the data sheets: bf16 and fp16, TF32, float32
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 495, 67),
    "H200": (989, 495, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
}
MOST_ON_GRID = 0.05  # fraction of all coordinates; by chance it is one in thousands
MOST_PIXELS_APART = 0.3  # mean error of boxes in half precision, in pixels of 1333


def write_all_data(check: Check) -> None:
    """Write images for the network and scenes for complete runs."""
    for name in ("photos", "long", "scenes"):
        shutil.rmtree(check.out / name, ignore_errors=True)
    make_data(check.out / "scenes", num_train=check.sized(64, 16), num_val=check.sized(16, 4), seed=0)
    pictures = load_data(check.out / "scenes" / "train")
    if check.on_gpu:
        # Not in a step that forks: a fork of a process that has computed on several threads hangs.
        taken_apart.without_download(check.out)
        (check.out / "photos").mkdir()
        pictures = write_data(check.out / "photos", write_photos(check.out / "photos", (768, 1280)))
    (check.out / "long").mkdir()
    for split, num_images in (("train", check.sized(1600, 160)), ("val", 4)):
        taken_apart.write_long_epoch(pictures, check.out / "long" / split, num_images)
    check.figures(size_hw=list(pictures.size_hw(0)))


def settings_for(check: Check) -> list[str]:
    """Return the overrides of the shipped configuration for this device."""
    if not check.on_gpu:
        return [*SMALL, "data.augmentation=light", "data.num_workers=1", "training.batch_size=2"]
    users = taken_apart.without_download(check.out)
    return [*users, "data.augmentation=light", "data.num_workers=6", "training.batch_size=8"]


def configured(check: Check, overrides: Sequence[str]) -> Config:
    """Return the configuration of a run that only trains, without evaluation plots or TensorBoard."""
    return load_config(
        check.repository / "configs" / "training.yaml",
        [
            *settings_for(check),
            *overrides,
            "training.num_epochs=1",
            "training.warmup_steps=1000000",  # so that these steps barely change the weights
            "evaluation.pictures=false",
            f"logging.mlflow_tracking_uri=sqlite:///{check.out / 'mlflow.db'}",
            "logging.tensorboard=false",
        ],
    )


def laid_out(check: Check, overrides: Sequence[str], held: ExitStack) -> taken_apart.Workbench:
    """Return a run that is ready to train in this process."""
    config = configured(check, overrides)
    set_numerics(config.training)
    held.enter_context(group_of_processes())
    shutil.rmtree(check.out / check.name, ignore_errors=True)
    places = taken_apart.Places(
        check.out / "long" / "train", check.out / "long" / "val", check.out / check.name
    )
    return taken_apart.lay_out(config, places, held)


def time_step(check: Check, overrides: Sequence[str], *, gpu_only: bool = False) -> None:
    """Report the time, operation rate and memory of a training step."""
    if gpu_only:
        check.needs_gpu("measured on a GPU only")
    with ExitStack() as held:
        bench = laid_out(check, overrides, held)
        settings = bench.setup.config.training
        first_s = seconds_of(bench.with_loop, bench.device)
        seconds = seconds_in_turns(bench)
        step_s, bare_s, library_s = medians(seconds).values()
        faster_than_library = median_ratio(seconds, "library", "step")
        check.figures(
            images=list(bench.batch.images.shape),
            tf32=torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32,
            step_ms=1e3 * step_s,
            images_per_s=len(bench.batch.image_ids) / step_s,
            bare_ms=1e3 * bare_s,
            of_the_bare=median_ratio(seconds, "step", "bare"),
            first_step_s=first_s,
            library_ms=1e3 * library_s,
            faster_than_library=faster_than_library,
        )
        tflops = bench.count_operations() / step_s / 1e12
        check.figures(TFLOPS=tflops)
        if not check.on_gpu:
            return
        peak = peak_tflops(settings.mixed_precision, tf32=settings.tf32)
        if peak is not None:
            check.figures(of_peak=tflops / peak)
        check.figures(GiB_an_image=gib_an_image(bench))
        busy_ms, bare_busy_ms = gpu_busy_ms(bench.with_loop), gpu_busy_ms(bench.bare)
        check.figures(gpu_busy_ms=busy_ms, bare_gpu_busy_ms=bare_busy_ms)
        if settings.compile_model:
            # Wall-clock time would measure the host, which launches kernels one by one.
            check.expect(
                0 < busy_ms <= 1.1 * bare_busy_ms,
                "the GPU works more than 1.10 of the bare network's time, or the profiler saw no work",
            )
            check.expect(
                faster_than_library >= 1.5, "less than 1.5 times as fast as the library's loss, uncompiled"
            )


def seconds_in_turns(bench: taken_apart.Workbench) -> dict[str, list[float]]:
    """Return the seconds per step of each block: the loop, the bare network, and the library's loss.

    Blocks alternate, so that a slow moment of the host affects all three.
    """
    block_steps, warm_up, rounds = (2, 2, 4) if bench.device.type == "cuda" else (1, 1, 1)

    def block(action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(block_steps):
                action()

        return run

    ways = {"step": bench.with_loop, "bare": bench.bare, "library": bench.with_library_loss}
    blocks = {name: block(action) for name, action in ways.items()}
    seconds = take_turns(blocks, rounds=rounds, warm_up=warm_up, device=bench.device)
    return {name: [block_s / block_steps for block_s in each] for name, each in seconds.items()}


def gpu_busy_ms(action: Callable[[], None], num_steps: int = 3) -> float:
    """Return the milliseconds per step in which the GPU works, without its waiting for the host."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            action()
        torch.cuda.synchronize()
    # Operations of the CPU and annotated regions repeat the time of their kernels.
    kernels_us = sum(
        event.self_device_time_total
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return kernels_us / 1e3 / num_steps


def peak_tflops(precision: str, *, tf32: bool) -> float | None:
    """Return the nominal peak of this GPU, or None if it is not in the table."""
    gpu = torch.cuda.get_device_name()
    for name, (half, tensor_float, single) in PEAK_TFLOPS.items():
        if name in gpu:
            return half if precision != "no" else tensor_float if tf32 else single
    return None


def gib_an_image(bench: taken_apart.Workbench) -> float:
    """Return the peak memory per image of a step, without the memory that stays allocated between steps."""
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bench.with_loop()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - resident) / 2**30 / len(bench.batch.image_ids)


def compare_boxes(check: Check) -> None:
    """Check that boxes in half precision are close to float32, and finer than half precision."""
    with ExitStack() as held:
        bench = laid_out(check, FLOAT32, held)
        for name, weight in bench.setup.detector.named_parameters():
            if "bbox" in name and weight.ndim == 2:  # otherwise all boxes would be equal
                nn.init.normal_(weight, std=0.6 * weight.shape[1] ** -0.5)
        exact = boxes_of(bench, "no")
        for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
            if name == "fp16" and not check.on_gpu:
                continue
            boxes = boxes_of(bench, name)
            pixels_apart = 1333 * (boxes.float() - exact).abs().mean().item()
            on_grid = (boxes.float() == boxes.to(dtype).float()).float().mean().item()
            check.figures(**{f"{name}_pixels_apart": pixels_apart, f"{name}_on_grid": on_grid})
            check.expect(on_grid < MOST_ON_GRID, f"boxes lie on the grid of {name}")
            check.expect(
                pixels_apart <= MOST_PIXELS_APART,
                f"boxes in {name} are more than {MOST_PIXELS_APART} px of 1333 from float32's on average",
            )


def boxes_of(bench: taken_apart.Workbench, precision: str) -> Tensor:
    detector = bench.setup.detector.eval()
    with torch.no_grad(), autocast(bench.device, precision):
        outputs = detector(bench.images, bench.sizes_hw, bench.is_padded)
    return outputs["pred_boxes"]


def count_waits(check: Check) -> None:
    """Count how often the host waits for the GPU in a step; expected once, for the assignment costs."""
    check.needs_gpu("the host never waits for a device")
    with ExitStack() as held:
        bench = laid_out(check, ["training.mixed_precision=bf16"], held)
        for _ in range(3):
            bench.with_loop()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            bench.with_loop()
            torch.cuda.set_sync_debug_mode("default")
        waits = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
        where = collections.Counter(f"{Path(each.filename).name}:{each.lineno}" for each in waits)
        check.figures(waits_a_step=len(waits), where=dict(where))
        check.expect(len(waits) <= 1, "the host waits for the GPU more than once a step")


def time_new_canvases(check: Check) -> None:
    """Compare the first step on each new canvas size with a second step on the same size."""
    least, step = (704, 64) if check.on_gpu else (64, 32)
    sizes_hw = [
        (least + step * i, 3 * least // 2 // step * step + step * (5 * i % 6))
        for i in range(check.sized(6, 2))
    ]
    with ExitStack() as held:
        bench = laid_out(check, ["training.mixed_precision=bf16"], held)
        bench.with_loop()
        new, again = ([seconds_on(bench, size_hw) for size_hw in sizes_hw] for _ in range(2))
        new_ms, again_ms = (1e3 * statistics.median(seconds) for seconds in (new, again))
        check.figures(new_canvas_ms=new_ms, same_again_ms=again_ms)
        check.expect_on_gpu(new_ms < 2 * again_ms, "a canvas of a new size costs more than a step")


def seconds_on(bench: taken_apart.Workbench, size_hw: tuple[int, int]) -> float:
    """Return the seconds of a step whose images all have this size."""
    num_images = len(bench.batch.image_ids)
    batch = dataclasses.replace(
        bench.batch,
        images=torch.randint(255, (num_images, 3, *size_hw), dtype=torch.uint8),
        sizes_hw=torch.tensor([size_hw] * num_images),
        is_padded=False,
    )
    return seconds_of(lambda: bench.step(itertools.repeat([batch])), bench.device)


def time_criterion(check: Check) -> None:
    """Compare the time of the criterion with the library's."""
    check.needs_gpu("criterion.py measures it on the CPU")
    program, path = check.repository / "scripts" / "benchmarks" / "criterion.py", check.out / "criterion.json"
    subprocess.run([sys.executable, program, "--device", "cuda", "--json", path], check=True)
    for row in json.loads(path.read_text())["rows"]:
        check.figures(**{f"{row['family']}_{name}": v for name, v in row.items() if name != "family"})


def time_tiles(check: Check) -> None:
    """Compare the detection in windows of images with that in the same windows as images of their own."""
    check.needs_gpu("tiles.py measures it on the CPU")
    program = check.repository / "scripts" / "benchmarks" / "tiles.py"
    for name, size in {"full_hd": "1920x1080", "4k": "3840x2160"}.items():
        path = check.out / f"tiles_{name}.json"
        command = [sys.executable, program, "--size", size, "--images", "16", "--json", path]
        subprocess.run([*command, "--rounds", "3"], check=True)
        found = json.loads(path.read_text())
        check.figures(**{f"{name}_{key}": found[key] for key in ("images_per_s", "ratio")})
        check.expect(found["ratio"] <= 1.15, f"{name}: windows take more than 1.15 times the time alone")
