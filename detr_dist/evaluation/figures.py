"""What all figures have in common: a look that depends on nobody's settings, and no display."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from detr_dist.evaluation.lettering import FONT, font

DPI = 120
MOST_CLASSES = 80
"""In a table; with more, lines of text come closer than they can be read."""
STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a class may be called $x$
    "font.family": [FONT],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Figures are made, and drawn, within it. What else draws meanwhile gets this look, too."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(title: str, width_inches: float, height_inches: float) -> Figure:
    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.1 / width_inches, ha="left", fontsize=10)
    return figure


def empty_figure(title: str) -> Figure:
    """In place of one that has nothing to show."""
    figure = new_figure(title, 5, 3)
    figure.text(0.5, 0.5, "no boxes to find", ha="center", va="center")
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG. Drawn once, where `Figure.savefig` draws twice."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(path)


def most_telling(labels: Sequence[int], weight: NDArray[Any]) -> list[int]:
    """Of classes no more than fit, those of most weight, in their order."""
    heaviest = sorted(labels, key=lambda label: -weight[label])[:MOST_CLASSES]
    return sorted(heaviest)


def few_of_many(num_shown: int, num_all: int, which: str) -> str:
    """What a title adds where classes are left out."""
    return f"; {num_shown} of {num_all:,} classes, {which}" if num_shown < num_all else ""


def extent_inches(texts: Sequence[str], size_pt: float) -> float:
    """Of the longest."""
    letters = font(100)
    return max(letters.getlength(text) for text in texts) / 100 * size_pt / 72
