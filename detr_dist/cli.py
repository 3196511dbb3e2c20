"""The command line. No logic here: each command reads its options and calls one function."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from detr_dist.config import DEFAULT_TRACKING_URI, describe_keys, load_config
from detr_dist.console import configure_logging, exiting_with_code, make_robust, refuse_empty
from detr_dist.errors import UsageError
from detr_dist.redaction import redacted_output

app = typer.Typer(
    name="detr-dist",
    help="Train DETR-family object detectors on one process or many, tracked in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error as well.")]
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
    train_dir: Annotated[Path, typer.Option(help="Folder with the training images and their COCO JSON.")],
    val_dir: Annotated[Path, typer.Option(help="Folder with the validation images and their COCO JSON.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for checkpoints, the best model and results.")],
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
    """Train a detector on COCO data.

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


@app.command()
def make_data(
    output_dir: Annotated[Path, typer.Argument(help="Folder to make `train` and `val` in.")],
    num_train: Annotated[int, typer.Option(help="Scenes to train on.")] = 512,
    num_val: Annotated[int, typer.Option(help="Scenes to validate on.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    debug: Debug = False,
) -> None:
    """Generate match scenes with players and a ball, as images and COCO JSON."""
    from detr_dist.data.synthetic import make_data as generate

    generate(output_dir, num_train=num_train, num_val=num_val, seed=seed)
    print(f"{num_train} scenes in {output_dir / 'train'}, {num_val} in {output_dir / 'val'}")


@app.command()
def check_data(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="D [D ...] [section.key=value]...",
            help="Data folders, one for each split, the one to train on first; settings that override the "
            "YAML file's may be given as well.",
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with the settings; data.resize with its edges, and model.*, count."),
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


@app.command()
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


@app.command()
def evaluate(
    model: Model,
    data_dir: Annotated[Path, typer.Option(help="Folder with images and their COCO JSON.")],
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
    of the stored image: an EXIF rotation is not applied, as in training. The model's training settings
    apply; `section.key=value` overrides them, e.g. `training.batch_size=16`.
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
