"""The commands of `detr-dist` that make, check, convert and split data sets."""

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error as well.")]
FORMATS = (
    "a folder with COCO JSON, YOLO's data.yaml or its folder, a Pascal VOC folder, CVAT's XML, or a .zip of "
    "any of them (docs/data.md)."
)
"""What can be named as a data set."""


def make_data(
    output_dir: Annotated[Path, typer.Argument(help="Folder to make `train` and `val` in.")],
    num_train: Annotated[int, typer.Option(help="Scenes to train on.")] = 512,
    num_val: Annotated[int, typer.Option(help="Scenes to validate on.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    size: Annotated[
        str, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels of the images, e.g. 1280x720.")
    ] = "192x160",
    ball_px: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="MIN MAX",
            help="Diameters in pixels of a far and of a near ball, e.g. 6 10: scenes as in footage, with "
            "players of natural size, motion blur, and things that look like a ball. Default: a ball "
            "larger than life.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Generate match scenes with players and a ball, as images and COCO JSON."""
    from detr_dist.data.synthetic import View
    from detr_dist.data.synthetic import make_data as generate

    generate(output_dir, num_train=num_train, num_val=num_val, seed=seed, view=View.of(size, ball_px))
    print(f"{num_train} scenes in {output_dir / 'train'}, {num_val} in {output_dir / 'val'}")


def check_data(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="D [D ...] [section.key=value]...",
            help="Data sets of any format, one for each split or with all splits, the one to train on first; "
            "settings that override the YAML file's may be given as well.",
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with the settings; data.resize with its edges, data.tiles, and model.*, count."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Open no image.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Report what is wrong or unusual in a data set before training on it.

    Finds images that are missing, cannot be decoded, or differ in size from the JSON; records, boxes, ids
    and classes that training would refuse, repair or leave out; images that are in two splits or look like
    an image of another split, and clips that are in two splits by file name; and classes that are too small
    for the configured model. Shows how many boxes each class has by size after the configured resize.

    Exits with 1 if there is any error, and with 0 if there are only warnings. `train` runs the fast checks
    itself.
    """
    from detr_dist.data.checks import check_data as run_check
    from detr_dist.models.families import finest_stride_of, num_queries_of

    if not run_check(
        targets,
        config,
        num_queries_of=num_queries_of,
        finest_stride_of=finest_stride_of,
        open_images=not quick,
        as_json=as_json,
    ):
        raise SystemExit(1)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help=f"The data set to convert: {FORMATS}")],
    output_dir: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist, or be empty.")
    ],
    debug: Debug = False,
) -> None:
    """Write a data set of any format as COCO.

    A data set that is split gets a folder for each split: `OUT/train`, `OUT/valid`, `OUT/test`; another one
    is written into OUT itself. Each has `_annotations.coco.json` beside its images, which are hard links
    where the file system allows it and copies elsewhere. Ids, the order of the images and sub-folders stay.
    Faults that training would refuse end it with one line; `check-data SRC` lists them all.
    """
    from detr_dist.data.convert import convert as run_convert

    for line in run_convert(source, output_dir):
        print(line)


def split(
    source: Annotated[Path, typer.Argument(metavar="D", help="The data set.")],
    output_dir: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder to make `train`, `valid` and, with --test, `test` in."),
    ],
    val: Annotated[float, typer.Option(help="Fraction of the images to validate on.")] = 0.2,
    test: Annotated[float | None, typer.Option(help="Fraction of the images to test on.")] = None,
    by: Annotated[
        str,
        typer.Option(
            help="How to tell clips apart: `clip`, by the file name before the frame number, or by "
            "look-alike images if the names do not tell; `folder`; or a regular expression, whose first "
            "group or whole match in the file name, with its folders, is the clip."
        ),
    ] = "clip",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same split.")] = 0,
    debug: Debug = False,
) -> None:
    """Split a data set into COCO folders, with all frames of a clip on one side.

    The fractions of images are as close to the wanted ones as whole clips allow, and rare classes are on
    every side if enough clips show them. Images are hard links where the file system allows them, else
    copies. docs/data.md explains it.
    """
    from detr_dist.data.split import split_data

    split_data(source, output_dir, val=val, test=test, by=by, seed=seed)
