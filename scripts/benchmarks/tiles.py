"""Compare the detection in windows of images with that in the same windows as images of their own.

    python scripts/benchmarks/tiles.py [--size 3840x2160] [--window 640] [--images 4] [--json FILE]

Both read JPEG files, resize to 640x640 and use batches of 8: on a GPU a network of full size in bf16,
otherwise a small one. Windows of an image are decoded once and merged; the full image is one of them.
Goal: at most 1.15 times the time of the windows alone.
"""

import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import command_line, median_ratio, medians, publish, take_turns

from detr_dist.config import load_config, specific_tiles
from detr_dist.data.unannotated import read_unannotated
from detr_dist.evaluation.image_pass import ImagePass
from detr_dist.models.build import build_detector
from detr_dist.models.detector import Detector

CLASS_NAMES = ["player", "goalkeeper", "referee", "ball"]
SETTINGS = (
    "model.model_architecture=rt_detr_v2",
    "model.pretrained_backbone=false",
    "data.shortest_edge=640",
    "training.batch_size=8",
)
FULL_SIZE = ("training.mixed_precision=bf16",)
SMALL = (
    *("model.backbone=resnet18", "model.hidden_dim=64", "model.num_decoder_layers=2"),
    *("training.mixed_precision=no", "data.num_workers=0"),
)


def scene(width: int, height: int, seed: int) -> Image.Image:
    """Return an image with the detail of a photograph: coarse shapes with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = pixels + rng.integers(-8, 8, pixels.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def measure(
    size: tuple[int, int], window: int, num_images: int, rounds: int, device: torch.device
) -> tuple[int, dict[str, list[float]]]:
    """Return the number of windows of an image, and the seconds of all images both ways, by round."""
    settings = (*SETTINGS, *(SMALL if device.type == "cpu" else FULL_SIZE))
    tiled = load_config(None, [*settings, f"data.tiles={{size: {window}}}"])
    tiles = specific_tiles(tiled)
    assert tiles is not None
    windows = tiles.grid.windows(size[1], size[0])
    detector = build_detector(tiled.model, CLASS_NAMES).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        images, cut = Path(folder, "images"), Path(folder, "windows")
        images.mkdir()
        cut.mkdir()
        for number in range(num_images):
            image = scene(*size, number)
            image.save(images / f"{number}.jpg", quality=90)
            for place, corners in enumerate(windows):
                image.crop(corners).save(cut / f"{number}_{place}.jpg", quality=90)
        ways = {}
        for name, source, config in (
            ("windows of images", images, tiled),
            ("windows alone", cut, load_config(None, settings)),
        ):
            names = sorted(path.name for path in source.iterdir())
            data, _ = read_unannotated(source, names, CLASS_NAMES, config.data.exif)
            ways[name] = partial(run, ImagePass(data, config, device), detector)
        return len(windows), take_turns(ways, rounds=rounds, device=device)


def run(images: ImagePass, detector: Detector) -> None:
    with closing(images.run(detector)) as all_predicted:
        for _ in all_predicted:
            pass


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size", default="1920x1080", help="width and height of the images")
    parser.add_argument("--window", type=int, default=640, help="side of the windows")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number, seconds = measure((width, height), options.window, options.images, options.rounds, device)
    of_image = {name: 1e3 * value / options.images for name, value in medians(seconds).items()}
    publish(
        [{"way": name, "ms_an_image": value} for name, value in of_image.items()],
        options.json,
        device=device,
        goals={"ratio": "1.15"},
        windows_an_image=number,
        images_per_s=1e3 / of_image["windows of images"],
        ratio=median_ratio(seconds, "windows of images", "windows alone"),
    )


if __name__ == "__main__":
    main()
