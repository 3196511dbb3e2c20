import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from detr_dist.data.coco import load_data
from detr_dist.data.dataset import Batch, CocoDetectionDataset, Sample, collate
from detr_dist.data.transforms import Augmentation, build_transform
from detr_dist.errors import DataError
from detr_dist.resize import Resize
from detr_dist.serving.decoding import decode_rgb

Document = dict[str, Any]
WriteCoco = Callable[..., Path]


def make_dataset(
    folder: Path, augmentation: Augmentation = "none", *, train: bool = True, seed: int = 0
) -> CocoDetectionDataset:
    transform = build_transform(augmentation, Resize(32, 64), train)
    return CocoDetectionDataset(load_data(folder), transform, seed=seed, train=train)


def test_a_sample_has_boxes_relative_to_its_own_size(document: Document, write_coco: WriteCoco) -> None:
    sample = make_dataset(write_coco(document))[0, 1]
    assert sample.image.dtype == torch.uint8
    assert sample.image.shape == (3, 32, 48)
    assert type(sample.image) is type(sample.boxes_cxcywh) is type(sample.labels) is torch.Tensor
    assert sample.image_id == 3
    assert sample.original_size_hw == (40, 60)
    expected = torch.tensor([[20 / 60, 20 / 40, 20 / 60, 30 / 40], [45 / 60, 30 / 40, 30 / 60, 20 / 40]])
    torch.testing.assert_close(sample.boxes_cxcywh, expected, atol=1e-6, rtol=0)  # float32 near 1
    assert sample.labels.tolist() == [1, 0]
    assert sample.unreadable == ()


def test_an_image_without_boxes_is_a_sample(document: Document, write_coco: WriteCoco) -> None:
    sample = make_dataset(write_coco(document), "detr")[0, 2]
    assert sample.boxes_cxcywh.shape == (0, 4)
    assert sample.labels.shape == (0,)
    assert sample.labels.dtype == torch.int64


def test_crowd_boxes_are_no_targets(document: Document, write_coco: WriteCoco) -> None:
    document["annotations"][0]["iscrowd"] = 1
    assert make_dataset(write_coco(document))[0, 1].labels.tolist() == [0]


def batches_of(dataset: CocoDetectionDataset, num_workers: int, batch_size: int) -> list[Batch]:
    keys = [(epoch, index) for epoch in range(2) for index in range(len(dataset))]
    groups = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    context = "fork" if num_workers else None
    return list(
        DataLoader(
            dataset,
            batch_sampler=groups,
            num_workers=num_workers,
            collate_fn=collate,
            multiprocessing_context=context,
        )
    )


def unpadded_images(batches: list[Batch]) -> list[torch.Tensor]:
    return [
        image[:, :height, :width].clone()
        for batch in batches
        for image, (height, width) in zip(batch.images, batch.sizes_hw.tolist(), strict=True)
    ]


def test_a_sample_is_the_same_in_any_process_and_any_batch(document: Document, write_coco: WriteCoco) -> None:
    dataset = make_dataset(write_coco(document), "detr")
    alone, inside, outside = (batches_of(dataset, *how) for how in ((0, 1), (0, 4), (2, 3)))
    for other in (inside, outside):
        for one, same in zip(unpadded_images(alone), unpadded_images(other), strict=True):
            assert torch.equal(one, same)
        for name in ("boxes_cxcywh", "labels"):
            one, same = (torch.cat([getattr(b, name) for b in batches]) for batches in (alone, other))
            assert torch.equal(one, same)


def test_a_sample_differs_between_epochs_and_seeds(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    looks = {
        (seed, epoch): make_dataset(folder, "light", seed=seed)[epoch, 0].image.numpy().tobytes()
        for seed in range(6)
        for epoch in range(6)
    }
    # A quarter is the image and a quarter its mirror image, unchanged; the others have their own colours.
    assert len(set(looks.values())) > 10
    for fixed in range(6):
        assert len({looks[fixed, epoch] for epoch in range(6)}) > 1
        assert len({looks[seed, fixed] for seed in range(6)}) > 1


def test_an_unreadable_image_is_replaced_by_the_next_in_training(
    document: Document, write_coco: WriteCoco
) -> None:
    folder = write_coco(document)
    dataset = make_dataset(folder, "light")
    expected = dataset[4, 0]
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:300])
    (folder / "5.jpg").unlink()
    sample = dataset[4, 1]
    assert [(row, reason.split(": ")[0]) for row, reason in sample.unreadable] == [
        (1, str(folder / "3.jpg")),
        (2, str(folder / "5.jpg")),
    ]
    assert "No such file" in sample.unreadable[1][1]
    assert sample.image_id == 7, "past the end it starts from the beginning"
    assert torch.equal(sample.image, expected.image)
    assert collate([expected, sample]).unreadable == list(sample.unreadable)


def test_an_unreadable_image_is_black_in_evaluation(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    dataset = make_dataset(folder, train=False)
    (folder / "3.jpg").write_text("no image")
    sample = dataset[0, 1]
    assert sample.image_id == 3
    assert sample.image.shape == (3, 32, 48)
    assert int(sample.image.max()) == 0
    assert len(sample.boxes_cxcywh) == 2
    ((row, reason),) = sample.unreadable
    assert row == 1
    assert reason.startswith(f"{folder / '3.jpg'}: ")


def test_many_unreadable_images_in_a_row_end_the_run(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    dataset = make_dataset(folder)
    for path in folder.glob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=r"10 images in a row cannot be read, .*jpg: No such file"):
        dataset[0, 0]


@pytest.mark.parametrize("train", [True, False])
def test_an_image_of_another_size_than_annotated_counts_as_unreadable(
    document: Document, write_coco: WriteCoco, train: bool
) -> None:
    folder = write_coco(document)
    dataset = make_dataset(folder, train=train)
    Image.new("RGB", (40, 60)).save(folder / "3.jpg")
    assert (
        "3.jpg: the image is 40x60 but its annotation says 60x40; it has no EXIF"
        in dataset[0, 1].unreadable[0][1]
    )
    Image.new("RGB", (41, 60)).save(folder / "3.jpg")
    assert (
        "3.jpg: the image is 41x60 but its annotation says 60x40; correct" in dataset[0, 1].unreadable[0][1]
    )


@pytest.mark.parametrize("augmentation", ["none", "light", "detr"])
def test_reduced_scale_decoding_keeps_boxes_and_crops_and_most_pixels(
    document: Document, write_coco: WriteCoco, augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in document["images"]:
        image |= {"width": 600, "height": 400}
    for annotation in document["annotations"]:
        annotation["bbox"] = [10 * value for value in annotation["bbox"]]
    dataset = make_dataset(write_coco(document), augmentation)
    keys = [(epoch, row) for epoch in range(30) for row in range(3)]
    as_always = [dataset[key] for key in keys]
    monkeypatch.setattr("detr_dist.data.dataset.decode_reduced", lambda *_: None)
    num_equal = 0
    for key, sample in zip(keys, as_always, strict=True):
        full = dataset[key]
        assert sample.image.shape == full.image.shape
        assert torch.equal(sample.boxes_cxcywh, full.boxes_cxcywh)
        assert torch.equal(sample.labels, full.labels)
        assert sample.original_size_hw == (400, 600)
        # Colours that fill many pixels: both ways differ in rounding, and by a few levels at edges.
        assert float((sample.image.float() - full.image.float()).abs().mean()) < 1
        num_equal += torch.equal(sample.image, full.image)
    # Half of `detr`'s are crops; 4.7 is a standard deviation.
    assert (25 < num_equal < 65) if augmentation == "detr" else num_equal == 0


def test_evaluation_decodes_at_the_full_scale(
    document: Document, write_coco: WriteCoco, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in document["images"]:
        image |= {"width": 600, "height": 400}
    dataset = make_dataset(write_coco(document), train=False)
    samples = [dataset[0, row] for row in range(3)]
    monkeypatch.setattr("detr_dist.data.dataset.decode_reduced", lambda *_: None)
    for row, sample in enumerate(samples):
        assert sample.image.shape[1] < 200
        assert torch.equal(sample.image, dataset[0, row].image)


@pytest.mark.parametrize("augmentation", ["none", "light", "detr"])
def test_no_image_is_decoded_smaller_than_its_transform_needs(
    document: Document, write_coco: WriteCoco, augmentation: Augmentation
) -> None:
    sizes_hw = [(64, 96), (65, 97), (127, 190), (131, 300), (300, 131), (500, 500), (801, 1203), (97, 1000)]
    for id_, (height, width) in enumerate(sizes_hw):
        document["images"].append(
            {"id": 100 + id_, "file_name": f"{100 + id_}.jpg", "width": width, "height": height}
        )
    folder = write_coco(document)
    dataset, reduced = make_dataset(folder, augmentation), 0
    for row in range(3, len(dataset)):
        path, size_hw = dataset.data.image_path(row), dataset.data.size_hw(row)
        for seed in range(20):
            plan = dataset.transform.plan(size_hw, np.random.default_rng(seed))
            image = dataset._read_image(row, plan)
            if plan.window is not None:
                assert torch.equal(image, decode_rgb(path))
                continue
            height, width = image.shape[-2:]
            reduced += (height, width) != size_hw
            assert height >= min(plan.size_hw[0], size_hw[0])
            assert width >= min(plan.size_hw[1], size_hw[1])
    assert reduced > 30


@pytest.mark.parametrize("augmentation", ["none", "light", "detr"])
def test_the_size_of_a_sample_is_known_before_loading(
    document: Document, write_coco: WriteCoco, augmentation: Augmentation
) -> None:
    dataset = make_dataset(write_coco(document), augmentation)
    for key in [(epoch, row) for epoch in range(10) for row in range(3)]:
        assert dataset.size_hw(key) == tuple(dataset[key].image.shape[-2:])


def test_reading_does_not_change_the_global_random_state(document: Document, write_coco: WriteCoco) -> None:
    dataset = make_dataset(write_coco(document), "detr")
    torch_state = torch.get_rng_state()
    numpy_state = json.dumps(np.random.get_state()[1].tolist())  # noqa: NPY002
    dataset[0, 1]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert json.dumps(np.random.get_state()[1].tolist()) == numpy_state  # noqa: NPY002


def test_a_data_set_can_be_sent_to_a_process_that_is_not_forked(
    document: Document, write_coco: WriteCoco
) -> None:
    dataset = make_dataset(write_coco(document), "detr")
    sent = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(sent[0, 1].image, dataset[0, 1].image)


def sample(
    height: int, width: int, num_boxes: int, image_id: int = 0, *unreadable: tuple[int, str]
) -> Sample:
    torch.manual_seed(height * 1000 + width)
    image = torch.randint(1, 256, (3, height, width), dtype=torch.uint8)
    boxes = torch.rand(num_boxes, 4)
    return Sample(image, torch.arange(num_boxes), boxes, image_id, (2 * height, 2 * width), unreadable)


SAMPLES = [
    sample(5, 7, 2, 11),
    sample(6, 4, 0, 12, (7, "a.jpg")),
    sample(3, 3, 1, 13, (8, "b.jpg"), (9, "c.jpg")),
]


def assert_holds(batch: Batch, samples: list[Sample]) -> None:
    for image, (height, width), one in zip(batch.images, batch.sizes_hw.tolist(), samples, strict=True):
        assert torch.equal(image[:, :height, :width], one.image)
        assert int(image[:, height:].sum()) == int(image[:, :, width:].sum()) == 0
    assert torch.equal(batch.boxes_cxcywh, torch.cat([one.boxes_cxcywh for one in samples]))
    assert torch.equal(batch.labels, torch.cat([one.labels for one in samples]))
    assert batch.num_boxes == [len(one.labels) for one in samples]


def test_images_share_a_canvas_of_the_greatest_height_and_width() -> None:
    batch = collate(SAMPLES)
    assert batch.images.shape == (3, 3, 6, 7)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes_hw.tolist() == [[5, 7], [6, 4], [3, 3]]
    assert batch.num_boxes == [2, 0, 1]
    assert batch.image_ids == [11, 12, 13]
    assert batch.original_sizes_hw == [(10, 14), (12, 8), (6, 6)]
    assert batch.unreadable == [(7, "a.jpg"), (8, "b.jpg"), (9, "c.jpg")]
    assert_holds(batch, SAMPLES)


def test_a_batch_without_any_box_has_empty_targets() -> None:
    batch = collate([sample(5, 7, 0), sample(6, 4, 0)])
    assert batch.boxes_cxcywh.shape == (0, 4)
    assert batch.labels.shape == (0,)
    assert batch.labels.dtype == torch.int64
    assert batch.num_boxes == [0, 0]


def test_a_larger_canvas_changes_only_the_margin() -> None:
    batch = collate(SAMPLES).pad_to(64, 64)
    assert batch.images.shape == (3, 3, 64, 64)
    assert_holds(batch, SAMPLES)


def test_a_smaller_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        collate(SAMPLES).pad_to(64, 6)


def test_moving_a_batch_keeps_all_its_fields() -> None:
    batch = collate(SAMPLES)
    moved = batch.to("cpu")
    assert_holds(moved, SAMPLES)
    assert moved.image_ids == batch.image_ids
    assert batch.to("meta").images.device.type == "meta"


def test_a_batch_is_unchanged_by_the_transfer_from_a_loader_process() -> None:
    loader = DataLoader(
        SAMPLES, batch_size=3, num_workers=1, collate_fn=collate, multiprocessing_context="fork"
    )
    (batch,) = loader
    assert_holds(batch, SAMPLES)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pinned memory belongs to it")
def test_pinned_memory_holds_the_same_batch() -> None:
    batch = collate(SAMPLES).pin_memory()
    assert batch.images.is_pinned()
    assert_holds(batch.to("cuda").to("cpu"), SAMPLES)
