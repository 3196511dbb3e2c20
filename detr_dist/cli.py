"""The command line. No logic here: each command reads its options and calls one function."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from detr_dist import data_commands
from detr_dist.config import DEFAULT_TRACKING_URI, describe_keys, load_config
from detr_dist.console import configure_logging, exiting_with_code, make_robust, refuse_empty
from detr_dist.data_commands import FORMATS, Debug
from detr_dist.errors import UsageError
from detr_dist.redaction import redacted_output

app = typer.Typer(
    name="detr-dist",
    help="Train DETR-family object detectors on one process or many, tracked in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Settings that override the YAML file's."),
]
Model = Annotated[
    str,
    typer.Option(
        help="A model's or checkpoint's folder, a run's id (its best model), runs:/RUN_ID/model, "
        "models:/NAME/VERSION, models:/NAME@ALIAS, or a hub id."
    ),
]
TrackingUri = Annotated[
    str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="Where MLflow keeps runs and registry.")
]


def _keys_help() -> str:
    """Return the configuration keys as Markdown, one line each."""
    lines = [f"- `{key}={default}` {meaning}" for key, default, meaning in describe_keys()]
    return "**Configuration keys** and their defaults:\n\n" + "\n".join(lines)


@app.command(epilog=_keys_help())
def train(
    train_dir: Annotated[
        list[str],
        typer.Option(
            metavar="DIR[=WEIGHT]",
            help=f"Training images and their annotations: {FORMATS} Give the option several times to "
            "train on several data sets with the same classes; with weights, each makes up that part of "
            "every epoch, relative to the others, e.g. `--train-dir a=1 --train-dir b=3`.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder for checkpoints, the best model and results.")],
    val_dir: Annotated[
        Path | None,
        typer.Option(help="Validation images and their annotations; unset: the split `val` of --train-dir."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the settings.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Resume a run exactly: `auto` (the newest intact checkpoint in the output folder, or a "
            "new run if there is none), a checkpoint's folder, an MLflow run id, or an artifact URI such as "
            "runs:/RUN_ID/checkpoints/last."
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Start a new run with these weights: a model's or checkpoint's folder, runs:/RUN_ID/model, "
            "models:/NAME/VERSION, or a hub id."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the data and your own classes, report what would run where, and end. Nothing is "
            "trained or written.",
        ),
    ] = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Train a detector on data in any common format.

    One process by itself; several with `accelerate launch --config_file accelerate_configs/multi_gpu.yaml
    scripts/train_detr.py` and the same options.

    SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 make it save and exit with 75 after the current step; `--resume auto`
    continues from there. A second Ctrl-C ends it at once.
    """
    settings = load_config(config, overrides or ())
    from detr_dist.training import trainer

    run = trainer.dry_run if dry_run else partial(trainer.train, handle_signals=True)
    run(
        settings,
        train_dir=train_dir,
        val_dir=val_dir,
        output_dir=output_dir,
        resume=resume,
        init_from=init_from,
    )


for _command in (
    data_commands.make_data,
    data_commands.check_data,
    data_commands.convert,
    data_commands.split,
):
    app.command()(_command)


@app.command()
def evaluate(
    model: Model,
    data_dir: Annotated[Path, typer.Option(help=f"Images and their annotations: {FORMATS}")],
    predictions: Annotated[
        Path | None, typer.Option(help="Write all detections as COCO results, for pycocotools' loadRes.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the metrics as JSON.")] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Folder to draw curves, the confusion matrix and the images with the worst errors into."
        ),
    ] = None,
    model_thresholds: Annotated[
        bool,
        typer.Option(
            "--model-thresholds",
            help="Precision, recall and F1 at the thresholds that training found and saved with the model, "
            "instead of the best ones for this data: what to expect on new data.",
        ),
    ] = False,
    log: Annotated[
        bool,
        typer.Option(
            "--log",
            help="Log the metrics as `test_...`, and the plots, to the model's run in MLflow, or to a new "
            "run if there is none that can be written to.",
        ),
    ] = False,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Evaluate a model on any data of its classes.

    The model's training settings apply; `section.key=value` overrides them, e.g.
    `training.batch_size=16`. One process by itself, several with `accelerate launch --config_file
    accelerate_configs/multi_gpu.yaml -m detr_dist evaluate` and the same options: the metrics are the same.
    docs/evaluation.md explains them.
    """
    from detr_dist.inference.evaluate import evaluate_to_files

    evaluate_to_files(
        model,
        data_dir,
        tracking_uri=tracking_uri,
        predictions=predictions,
        report=report,
        pictures=pictures,
        model_thresholds=model_thresholds,
        log=log,
        overrides=overrides or (),
    )


@app.command()
def predict(
    model: Model,
    source: Annotated[Path, typer.Option("--input", help="An image, or a folder of them.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the drawn images and predictions.json.")],
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Least score of a detection; unset: that of each class which the model brings from "
            "training, else 0.5.",
        ),
    ] = None,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Find objects in images: draw the boxes into copies and write COCO results.

    In `predictions.json` image_id numbers the images from 1 in the order of their names, which the file
    lists too, and category_id numbers the model's classes from 0. Boxes are [x, y, width, height] in pixels
    of the image as a person sees it, after its EXIF rotation, unless `data.exif` is `ignore`. The model's
    training settings apply; `section.key=value` overrides them, e.g. `training.batch_size=16`.
    """
    from detr_dist.inference.predict import predict_images

    predict_images(
        model,
        source,
        output_dir,
        tracking_uri=tracking_uri,
        threshold=threshold,
        overrides=overrides or (),
    )


@app.command()
def errors(
    model: Model,
    data_dir: Annotated[
        Path, typer.Option(help=f"Images and their annotations: {FORMATS} Or a folder of images alone.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder to make; it must not exist, or be empty.")],
    top: Annotated[int, typer.Option(min=1, help="Number of images to write.")] = 100,
    form: Annotated[
        Literal["coco", "cvat", "yolo"], typer.Option("--as", help="Format of the boxes to correct.")
    ] = "coco",
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Collect the images on which a model errs most, with boxes to correct and to train on.

    The images come first in which objects of rare and small classes are not found. Of images without
    annotations, those with the most uncertain detections come first. `data` is a data set to be corrected,
    with the annotations and the detections that match none, or with the detections alone; `errors.csv` lists
    why each image is there; `drawn` and `crops` show it. docs/evaluation.md explains them.
    """
    from detr_dist.inference.hard_images import write_hard_images

    write_hard_images(
        model, data_dir, output_dir, top=top, form=form, tracking_uri=tracking_uri, overrides=overrides or ()
    )


@app.command()
def export(
    model: Model,
    output_dir: Annotated[Path, typer.Option(help="Folder to make; it must not exist, or be empty.")],
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="Write model.onnx as well, for images of any number and size."),
    ] = False,
    register_as: Annotated[
        str | None, typer.Option(help="Make it a new version of this name in MLflow's registry.")
    ] = None,
    alias: Annotated[
        str | None, typer.Option(help="Have this alias, e.g. production, point to the new version.")
    ] = None,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    debug: Debug = False,
) -> None:
    """Export a model for production, to a folder that can be used without this package.

    `mlflow.pytorch.load_model` and `transformers.pipeline("object-detection", model=...)` load it. The ONNX
    file is compared with torch before it is kept: inputs `pixel_values` (float32, normalised) and
    `pixel_mask` (int64), outputs `logits` and `pred_boxes`.
    """
    from detr_dist.inference.export import export as run_export

    run_export(model, output_dir, tracking_uri=tracking_uri, onnx=onnx, register_as=register_as, alias=alias)


@app.command()
def sync(
    output_dir: Annotated[Path, typer.Argument(help="The --output-dir of a run.")],
    debug: Debug = False,
) -> None:
    """Deliver to MLflow what a run could not deliver because the server was unavailable."""
    from detr_dist.tracking.delivery import sync as deliver

    deliver(output_dir)


@app.command()
def prune(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OUTPUT_DIR | RUN_ID]...", help="Runs, by output folder or MLflow run id."),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="All runs of this MLflow experiment that have ended, as well.")
    ] = None,
    keep_last: Annotated[
        int, typer.Option(min=1, help="Newest checkpoints, and newest epoch models, to keep of each run.")
    ] = 1,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete; without it only list what could be deleted.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Delete old checkpoints and epoch models, in output folders and in MLflow.

    The checkpoints `best` and `last` and the best model always stay. `checkpoint.keep_last` in the
    configuration does the same during a run.
    """
    from detr_dist.training.prune import prune as run_prune

    run_prune(
        targets or (),
        experiment=experiment,
        tracking_uri=tracking_uri,
        keep_last=keep_last,
        delete=delete,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage or configuration, 75 stopped on request.

    An error prints one clear line, on every process; nothing that is printed holds credentials.
    """
    make_robust()
    configure_logging()
    with redacted_output():
        _run(argv)


def _run(argv: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Plots are files. With the backend inherited from a notebook, matplotlib may fail to import.
    os.environ["MPLBACKEND"] = "agg"
    with exiting_with_code(show_traceback="--debug" in arguments):
        refuse_empty(arguments)
        try:
            # Typer turns Ctrl-C into an exit code and returns it.
            if app(arguments, prog_name="detr-dist", standalone_mode=False) == 130:
                raise KeyboardInterrupt
        except typer.Abort:
            raise KeyboardInterrupt from None
        except typer.TyperException as error:
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            if not message:  # without any argument the help has been printed already
                raise SystemExit(2) from None
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "detr-dist"
            raise UsageError(f"{message.rstrip('.')}; see {command} --help") from None
