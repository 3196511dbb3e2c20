import pytest
import torch
from torch.utils.data import DataLoader

from detr_dist.data.batching import Batch, Sample, collate


def sample(height: int, width: int, num_boxes: int, image_id: int = 0, *unreadable: str) -> Sample:
    torch.manual_seed(height * 1000 + width)
    image = torch.randint(1, 256, (3, height, width), dtype=torch.uint8)
    boxes = torch.rand(num_boxes, 4)
    reasons = tuple((image_id, path) for path in unreadable)
    return Sample(image, torch.arange(num_boxes), boxes, image_id, (2 * height, 2 * width), reasons)


SAMPLES = [sample(5, 7, 2, 11), sample(6, 4, 0, 12, "a.jpg"), sample(3, 3, 1, 13, "b.jpg", "c.jpg")]


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
    assert batch.unreadable == [(12, "a.jpg"), (13, "b.jpg"), (13, "c.jpg")]
    assert_holds(batch, SAMPLES)


def test_a_batch_without_any_box_has_empty_targets() -> None:
    batch = collate([sample(5, 7, 0), sample(6, 4, 0)])
    assert batch.boxes_cxcywh.shape == (0, 4)
    assert batch.labels.shape == (0,)
    assert batch.labels.dtype == torch.int64
    assert batch.num_boxes == [0, 0]


def test_a_larger_canvas_changes_nothing_but_the_margin() -> None:
    batch = collate(SAMPLES).pad_to(64, 64)
    assert batch.images.shape == (3, 3, 64, 64)
    assert_holds(batch, SAMPLES)


def test_a_smaller_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        collate(SAMPLES).pad_to(64, 6)


def test_moving_a_batch_keeps_all_of_it() -> None:
    batch = collate(SAMPLES)
    moved = batch.to("cpu")
    assert_holds(moved, SAMPLES)
    assert moved.image_ids == batch.image_ids
    assert batch.to("meta").images.device.type == "meta"


def test_a_batch_survives_the_way_out_of_a_loader_process() -> None:
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
