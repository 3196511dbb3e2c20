"""Transforms that a user names in `data.augmentation`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.data import write_coco
from torch import Tensor
from torchvision.transforms import v2

from detr_dist.config import load_config
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import CocoDetectionDataset, Sample, training_dataset
from detr_dist.data.example import Example
from detr_dist.data.loading import BatchLoader, shared_memory_need
from detr_dist.data.sampling import MicroBatchSampler, StepPlan
from detr_dist.data.transforms import Plan, build_transform
from detr_dist.errors import DataError, LoaderError, UsageError
from detr_dist.extensions import TRANSFORMS
from detr_dist.resize import Resize
from detr_dist.training.setup import warn_of_augmentation

NUM_IMAGES = 8
SOURCE = """
from detr_dist.data.transforms import Example
from detr_dist.extensions import register_transform

@register_transform("noise_by_name")
class Noise:
    def __call__(self, example, rng):
        noise = rng.integers(0, 9, tuple(example.image.shape), dtype="uint8")
        return Example(example.image + example.image.new_tensor(noise), example.boxes, example.labels)
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(TRANSFORMS, "_objects", dict(TRANSFORMS._objects))
    return


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    folder = tmp_path_factory.mktemp("data") / "train"
    write_coco(folder, num_images=NUM_IMAGES, with_boxes=lambda i: i % 3, mixed_sizes=True)
    return load_data(folder)


def dataset(data: CocoData, *names: object, train: bool = True) -> CocoDetectionDataset:
    """Build a data set; functions and classes among the names are registered as `own_<n>`, n from 0."""
    own = [name for name in names if not isinstance(name, str)]
    for number, value in enumerate(own):
        TRANSFORMS._objects[f"own_{number}"] = value
    augmentation = [name if isinstance(name, str) else f"own_{own.index(name)}" for name in names]
    transform = build_transform(augmentation, Resize(64, 96), train)
    return CocoDetectionDataset(data, transform, seed=3, train=train)


def assert_same(one: Sample, other: Sample) -> None:
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh)
    assert torch.equal(one.labels, other.labels)


def speckle(example: Example, rng: np.random.Generator) -> Example:
    """Draw from the generator, and from torch's own as torchvision's transforms do."""
    image = v2.ColorJitter(brightness=0.5)(example.image)
    noise = torch.from_numpy(rng.integers(0, 5, tuple(image.shape), dtype=np.uint8))
    return Example(image // 2 + noise, example.boxes, example.labels)


def as_it_is(example: Example, rng: np.random.Generator) -> Example:
    rng.random(100)
    torch.rand(100)
    return example


class Mean:
    """Mean of an example and two others."""

    num_partners = 2

    def __call__(self, example: Example, rng: np.random.Generator, partners: Sequence[Example]) -> Example:
        assert len(partners) == 2
        size = list(example.image.shape[-2:])
        images = [v2.functional.resize(each.image, size).float() for each in (example, *partners)]
        return Example(torch.stack(images).mean(dim=0).to(torch.uint8), example.boxes, example.labels)


def test_a_transform_is_found_by_name_module_and_file(
    data: CocoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_noise.py").write_text(SOURCE)
    (tmp_path / "own_noise_file.py").write_text(SOURCE.replace("noise_by_name", "another"))
    monkeypatch.syspath_prepend(str(tmp_path))
    by_path = dataset(data, "light", "own_noise.Noise")[1, 2]
    assert_same(dataset(data, "light", "noise_by_name")[1, 2], by_path)
    assert_same(dataset(data, "light", f"{tmp_path}/own_noise_file.py:Noise")[1, 2], by_path)
    assert not torch.equal(dataset(data, "light")[1, 2].image, by_path.image)


@pytest.mark.parametrize("split", [(2, 2, 1), (1, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_split_and_any_number_of_workers_give_the_same_samples(
    data: CocoData, split: tuple[int, int, int], num_workers: int
) -> None:
    names = ("detr", speckle, Mean, "mosaic")
    complete = dataset(data, *names)
    config = load_config(None, [f"data.num_workers={num_workers}"])
    plan = StepPlan(len(data), *split)
    for process_index in range(plan.num_processes):
        sampler = MicroBatchSampler(plan, 3, process_index, 0, 3, complete.size_hw)
        need = shared_memory_need(config, data, train=True)
        loader = BatchLoader(dataset(data, *names), sampler, config.data, pin_memory=False, need=need)
        for keys, batch in zip(sampler, loader, strict=True):
            samples = [complete[key] for key in keys]
            assert batch.image_ids == [sample.image_id for sample in samples]
            assert torch.equal(batch.boxes_cxcywh, torch.cat([sample.boxes_cxcywh for sample in samples]))
            for image, (height, width), sample in zip(
                batch.images, batch.sizes_hw.tolist(), samples, strict=True
            ):
                assert torch.equal(image[:, :height, :width], sample.image)


@pytest.mark.parametrize("names", [(speckle,), (Mean,), ("mosaic",)])
def test_a_sample_differs_between_epochs(data: CocoData, names: tuple[object, ...]) -> None:
    samples = dataset(data, *names)
    assert len({samples[epoch, 5].image.numpy().tobytes() for epoch in range(8)}) > 3


def test_a_transform_does_not_affect_the_random_numbers_of_others(data: CocoData) -> None:
    for row in range(NUM_IMAGES):
        assert_same(dataset(data, "detr", as_it_is)[0, row], dataset(data, "detr")[0, row])
        assert_same(dataset(data, speckle, as_it_is)[0, row], dataset(data, "none", speckle)[0, row])


def test_list_entries_draw_independently_and_in_order(data: CocoData) -> None:
    drawn: list[float] = []

    def note(example: Example, rng: np.random.Generator) -> Example:
        drawn.extend((rng.random(), float(torch.rand(()))))
        return example

    dataset(data, note, note)[0, 0]
    first = drawn.copy()
    assert len(set(drawn)) == 4
    dataset(data, note)[0, 0]
    assert drawn[4:] == first[:2]

    def dark(example: Example, rng: np.random.Generator) -> Example:
        return Example(torch.zeros_like(example.image), example.boxes, example.labels)

    assert int(dataset(data, speckle, dark)[0, 0].image.max()) == 0
    assert int(dataset(data, dark, speckle)[0, 0].image.max()) > 0


def test_the_global_random_state_is_unchanged(data: CocoData) -> None:
    before = torch.get_rng_state()
    dataset(data, speckle)[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_partners_are_other_images_prepared_by_the_recipe(data: CocoData) -> None:
    got: list[Example] = []

    def keep(example: Example, rng: np.random.Generator, partners: Sequence[Example]) -> Example:
        got.extend(partners)
        return example

    keep.num_partners = NUM_IMAGES - 1  # type: ignore[attr-defined]
    dataset(data, "detr", speckle, keep)[4, 2]
    images = [partner.image.numpy().tobytes() for partner in got]
    expected = [dataset(data, "detr")[4, row].image.numpy().tobytes() for row in range(NUM_IMAGES)]
    assert sorted(images) == sorted(image for row, image in enumerate(expected) if row != 2)


def test_an_unreadable_partner_is_replaced_and_reported_as_its_own_sample_only(tmp_path: Path) -> None:
    write_coco(tmp_path / "train", num_images=3, with_boxes=lambda i: 1, mixed_sizes=False)
    samples = dataset(load_data(tmp_path / "train"), Mean)
    (tmp_path / "train" / "001.jpg").write_text("no image")
    assert samples[0, 0].unreadable == ()
    assert [row for row, _ in samples[0, 1].unreadable] == [1]


def test_a_partner_is_read_once_and_only_when_it_is_used(
    data: CocoData, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_image = CocoDetectionDataset._read_image

    def note(self: CocoDetectionDataset, row: int, plan: Plan) -> Tensor:
        read.append(row)
        return read_image(self, row, plan)

    monkeypatch.setattr(CocoDetectionDataset, "_read_image", note)
    samples, numbers_read = dataset(data, "mosaic"), set()
    for row in range(NUM_IMAGES):
        samples[0, row]
        numbers_read.add(len(read))
        read.clear()
    assert numbers_read == {1, 4}

    def twice(example: Example, rng: np.random.Generator, partners: Sequence[Example]) -> Example:
        assert [partners[-1], partners[-1]] == [*partners[2:], partners[2]]
        return example

    twice.num_partners = 3  # type: ignore[attr-defined]
    dataset(data, twice)[0, 0]
    assert len(read) == 2


def test_too_many_unreadable_partners_are_not_called_a_failure_of_the_transform(tmp_path: Path) -> None:
    write_coco(tmp_path / "train", num_images=24, with_boxes=lambda i: 1, mixed_sizes=False)
    samples = dataset(load_data(tmp_path / "train"), Mean)
    for number in range(1, 24):
        (tmp_path / "train" / f"{number:03}.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"^10 images in a row cannot be read"):
        [samples[epoch, 0] for epoch in range(9)]


def test_evaluation_applies_no_transform_and_imports_none(data: CocoData) -> None:
    assert_same(dataset(data, "no.such.module", train=False)[0, 0], dataset(data, "none")[0, 0])


def returning(image: Any = None, boxes: Any = None, labels: Any = None) -> Any:
    """Return a transform that changes parts of an example."""
    given = (image, boxes, labels)

    def transform(example: Example, rng: np.random.Generator) -> Any:
        return Example(
            *(part if new is None else new(part) for part, new in zip(example, given, strict=True))
        )

    return transform


def raising(example: Example, rng: np.random.Generator) -> Example:
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("transform", "facts"),
    [
        (raising, ["ValueError", "two lines"]),
        (lambda example, rng: None, ["NoneType", "Example"]),
        (lambda example, rng: example[:2], ["tuple", "Example"]),
        (returning(image=lambda image: image.float()), ["image", "float32", "uint8"]),
        (returning(image=lambda image: image[:, 1:]), ["image", "[3, 60, 96]", "[3, 61, 96]"]),
        (returning(boxes=lambda boxes: boxes.double()), ["boxes", "float64", "float32"]),
        (returning(boxes=lambda boxes: boxes[:, :3]), ["boxes", "[2, 3]", "[2, 4]"]),
        (returning(boxes=lambda boxes: boxes[:1]), ["labels", "[2]", "[1]"]),
        (returning(boxes=lambda boxes: boxes * float("nan")), ["box", "nan"]),
        (returning(boxes=lambda boxes: boxes.flip(1)), ["box", "[x1, y1, x2, y2]"]),
        (returning(labels=lambda labels: labels.int()), ["labels", "int32", "int64"]),
        (returning(labels=lambda labels: labels + 2), ["labels", "[2, 3]", "0 to 1"]),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_transform_error_is_one_line_with_its_name_and_the_image(
    data: CocoData, transform: Any, facts: list[str], num_workers: int
) -> None:
    config = load_config(None, [f"data.num_workers={num_workers}"])
    need = shared_memory_need(config, data, train=True)
    samples = dataset(data, transform)
    loader = BatchLoader(samples, [[(0, 2)]], config.data, pin_memory=False, need=need)
    with pytest.raises(LoaderError) as raised:
        list(loader)
    message = str(raised.value)
    assert message.startswith("data.augmentation: own_0 failed on image 12, ")
    assert "\n" not in message
    assert not [fact for fact in ("002.jpg", *facts) if fact not in message], message


def test_boxes_are_clipped_and_those_without_extent_dropped(data: CocoData) -> None:
    corners = [[-5.0, -5, 9, 9], [70, 3, 200, 30], [500, 1, 600, 9], [4, 4, 4, 9]]
    new = returning(boxes=lambda _: torch.tensor(corners), labels=lambda _: torch.tensor([0, 1, 0, 1]))
    sample = dataset(data, new)[0, 0]
    height, width = sample.image.shape[-2:]
    assert sample.labels.tolist() == [0, 1]
    expected = torch.tensor([[4.5 / width, 4.5 / height], [(70 + width) / 2 / width, 16.5 / height]])
    torch.testing.assert_close(sample.boxes_cxcywh[:, :2], expected, atol=1e-6, rtol=0)  # float32 near 1


class Demanding:
    def __init__(self, strength: int) -> None: ...


def test_an_unusable_transform_is_an_error_before_data_are_loaded(data: CocoData) -> None:
    for names, complaint in (
        (("absent",), "there is no augmentation 'absent'"),
        ((Demanding,), "own_0 cannot be instantiated without arguments: TypeError"),
        ((3,), "own_0 is neither a function nor a class"),
    ):
        with pytest.raises(UsageError, match=rf"^data\.augmentation: {complaint}"):
            dataset(data, *names)


def test_more_partners_than_images_are_an_error(tmp_path: Path) -> None:
    write_coco(tmp_path / "train", num_images=3, with_boxes=lambda i: 1, mixed_sizes=False)
    config = load_config(None, ["data.augmentation=[light, mosaic]"])
    with pytest.raises(UsageError, match="mosaic needs 3 other images, but the training data has 3"):
        training_dataset(load_data(tmp_path / "train"), config)


def test_more_boxes_than_queries_through_partners_are_a_warning(
    data: CocoData, caplog: pytest.LogCaptureFixture
) -> None:
    assert data.max_boxes_per_image == 2
    warn_of_augmentation(dataset(data, "mosaic"), num_queries=8)
    assert not caplog.records
    warn_of_augmentation(dataset(data, "mosaic", Mean), num_queries=8)
    assert "up to 12 boxes" in caplog.text
    assert "model.num_queries" in caplog.text
