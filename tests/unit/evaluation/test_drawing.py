"""Boxes and captions are visible and inside the image."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_dist.evaluation.drawing import Colour, Mark, class_colour, class_label, draw_marks, drawable

RED, BLUE = (255, 0, 0), (0, 0, 255)


def blank(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), 90, dtype=torch.uint8)


def draw_boxes(image: Tensor, boxes: Tensor, captions: Sequence[str], colours: Sequence[Colour]) -> Tensor:
    canvas = Image.fromarray(image.permute(1, 2, 0).numpy())
    columns = zip(boxes.tolist(), colours, captions, strict=True)
    draw_marks(canvas, [Mark(tuple(box), colour, caption) for box, colour, caption in columns])
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def changed(before: Tensor, after: Tensor) -> Tensor:
    return (before != after).any(dim=0)


def drawn(canvas: Tensor, box: tuple[float, ...], caption: str) -> Tensor:
    return changed(canvas, draw_boxes(canvas, torch.tensor([box]), [caption], [RED]))


def of_colour(canvas: Tensor, colour: tuple[int, int, int]) -> int:
    return int((canvas == torch.tensor(colour)[:, None, None]).all(dim=0).sum())


def test_lines_run_around_the_box() -> None:
    mask = drawn(blank(300, 300), (100.0, 120, 200, 220), "")
    assert not mask[120:220, 100:200].any()
    assert mask[119, 100:200].all()
    assert mask[220, 100:200].all()
    assert mask[120:220, 99].all()
    assert mask[120:220, 200].all()


def test_a_dashed_line_runs_where_a_solid_one_does_with_gaps() -> None:
    canvas, mark = Image.new("RGB", (300, 300)), Mark((100.0, 120, 200, 220), RED)
    dashed = canvas.copy()
    draw_marks(canvas, [mark])
    draw_marks(dashed, [replace(mark, dashed=True)])
    solid, dashes = (np.asarray(each)[:, :, 0] > 0 for each in (canvas, dashed))
    assert not (dashes & ~solid).any()
    assert 0.5 < dashes.sum() / solid.sum() < 0.7  # three of five


def test_a_caption_is_complete_wherever_the_box_is() -> None:
    canvas = blank(300, 400)
    areas = {
        int(drawn(canvas, (left, top, left + 20, top + 20), "goal post 0.87").sum())
        for left in (4.0, 190, 376)
        for top in (4.0, 140, 276)
    }
    assert len(areas) == 1


def test_captions_of_equal_boxes_do_not_overlap() -> None:
    boxes = torch.tensor([[100.0, 100, 160, 160]]).expand(2, 4)
    canvas = draw_boxes(blank(300, 300), boxes, ["player 0.70", "ball 0.60"], [RED, BLUE])
    first = draw_boxes(blank(300, 300), boxes[:1], ["player 0.70"], [RED])
    second = draw_boxes(blank(300, 300), boxes[:1], ["ball 0.60"], [BLUE])
    frame = draw_boxes(blank(300, 300), boxes[:1], [""], [BLUE])
    assert of_colour(canvas, RED) == of_colour(first, RED)
    # The first box lies on top, so of the second one the caption is left, all of it.
    assert of_colour(canvas, BLUE) == of_colour(second, BLUE) - of_colour(frame, BLUE)


def test_a_box_of_one_pixel_is_drawn_around_the_pixel() -> None:
    mask = drawn(blank(200, 200), (100.0, 50, 101, 51), "")
    rows, columns = np.nonzero(mask.numpy())
    assert np.ptp(rows) >= 6
    assert np.ptp(columns) >= 6
    assert not mask[50, 100]


def test_a_box_that_fills_the_image_is_visible() -> None:
    mask = drawn(blank(40, 60), (0.0, 0, 60, 40), "")
    assert mask[0].all()
    assert mask[-1].all()
    assert mask[:, 0].all()
    assert mask[:, -1].all()


def test_line_width_and_font_size_grow_with_the_image() -> None:
    small = drawn(blank(900, 900), (300.0, 300, 600, 600), "ball").sum() / 900**2
    large = drawn(blank(2700, 2700), (900.0, 900, 1800, 1800), "ball").sum() / 2700**2
    assert 0.9 < small / large < 1.1  # pixels are integers, letters have hinting


def test_a_long_caption_is_shortened_and_omitted_where_it_does_not_fit() -> None:
    assert drawn(blank(80, 60), (20.0, 40, 40, 60), "a very long caption " * 5)[:38].any()
    without = drawn(blank(8, 8), (2.0, 2, 5, 5), "")
    assert torch.equal(drawn(blank(8, 8), (2.0, 2, 5, 5), "caption"), without)


def test_without_boxes_the_image_is_unchanged() -> None:
    assert torch.equal(draw_boxes(blank(20, 20), torch.zeros(0, 4), [], []), blank(20, 20))


def test_eighty_classes_have_distinct_colours() -> None:
    colours = np.array([class_colour(index) for index in range(80)], dtype=float)
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e3 * np.eye(80)
    assert distances.min() > 50
    assert distances[:12, :12].min() > 100
    assert isinstance(class_colour(5000), tuple)


def test_names_keep_only_characters_that_the_font_has() -> None:
    assert drawable("player") == "player"
    assert drawable("a very long name of a class", limit=11) == "a ver…class"
    assert class_label(3, "サッカー") == "class 3"
    assert class_label(3, "ball\n\U0001f3d0") == "ball"
