"""`detr-dist check-data`: what is wrong or odd in the splits of a data set, as text or JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detr_dist.config import Config, load_config
from detr_dist.data.findings import Finding, found
from detr_dist.data.record_checks import check_classes, check_records
from detr_dist.data.statistics import BAND_NAMES, CheckSettings, Figures, check_boxes, figures_of
from detr_dist.errors import UsageError
from detr_dist.text import printable

MOSTLY_EMPTY_SHARE = 0.5


@dataclass(frozen=True)
class Report:
    """What there is to say about the splits, in their order."""

    settings: CheckSettings
    opened_pictures: bool
    figures: dict[str, Figures]  # of the splits of which there is something to count
    findings: dict[str, list[Finding]]  # of each split, errors first

    @property
    def num_errors(self) -> int:
        return sum(f.level == "error" for findings in self.findings.values() for f in findings)

    @property
    def num_warnings(self) -> int:
        return sum(f.level == "warning" for findings in self.findings.values() for f in findings)

    @property
    def verdict(self) -> str:
        errors = "1 error" if self.num_errors == 1 else f"{self.num_errors} errors"
        warnings = "1 warning" if self.num_warnings == 1 else f"{self.num_warnings} warnings"
        return f"{errors}, {warnings}: {'not ready' if self.num_errors else 'ready'} to train"

    def lines(self) -> Iterator[str]:
        """For a person to read, the verdict last."""
        for split, findings in self.findings.items():
            if split in self.figures:
                yield from _describe(split, self.figures[split], self.settings)
            else:
                yield f"{printable(split)}: nothing that could be counted"
            yield from (f"  {finding.level}: {finding}" for finding in findings)
            yield ""
        if not self.opened_pictures:
            yield "pictures were not opened"
        yield f"verdict: {self.verdict}"


def check_data(
    targets: Sequence[str], config_path: Path | None, *, open_pictures: bool, as_json: bool
) -> bool:
    """Print what is wrong or odd in the data folders among `targets`; the other targets are settings.

    Returns whether there are no errors.

    Raises:
        UsageError: no folder is named, or a setting is wrong.
        DataError: a folder holds no COCO JSON to check.
    """
    folders = [target for target in targets if "=" not in target or Path(target).is_dir()]
    config = load_config(config_path, [target for target in targets if target not in folders])
    if not folders:
        raise UsageError("no data folder is named; name one or more, the one to train on first")
    report = check_splits(
        list({Path(folder).resolve(): folder for folder in reversed(folders)}.values())[::-1],
        config,
        open_pictures=open_pictures,
    )
    print(json.dumps(_as_document(report), indent=2) if as_json else "\n".join(report.lines()))
    return report.num_errors == 0


def check_splits(splits: Sequence[str], config: Config, *, open_pictures: bool) -> Report:
    """The first split is the one to train on, whose classes the others must have."""
    settings = _settings(config)
    pictures = None
    if open_pictures:
        from detr_dist.data.picture_checks import PictureCheck  # imports torch, which takes seconds

        pictures = PictureCheck()
    report = Report(settings, open_pictures, {}, {})
    reference: tuple[str, tuple[str, ...]] | None = None
    for split in splits:
        checked = check_records(split)
        findings, data = list(checked.findings), checked.data
        if data is not None:
            reference = reference or (split, data.class_names)
            findings += check_classes(split, checked, *reference)
            findings += check_boxes(split, data, settings, trains=split == splits[0])
            figures = report.figures[split] = figures_of(data, settings)
            if figures.num_images > figures.num_empty > MOSTLY_EMPTY_SHARE * figures.num_images:
                findings += found("mostly_empty", split, (), count=figures.num_empty)
            if pictures is not None:
                findings += pictures.check(split, data, checked.missing)
        report.findings[split] = sorted(findings, key=lambda finding: finding.level != "error")
    return report


def _settings(config: Config) -> CheckSettings:
    num_queries = config.model.num_queries
    if num_queries is None:
        from detr_dist.models.architectures import num_queries_of  # imports torch as well

        num_queries = num_queries_of(config.model)
    return CheckSettings(config.data.shortest_edge, config.data.longest_edge, num_queries)


def _as_document(report: Report) -> dict[str, Any]:
    return {
        "ready": report.num_errors == 0,
        "verdict": report.verdict,
        "opened_pictures": report.opened_pictures,
        "settings": asdict(report.settings),
        "splits": [{"split": split, **_figures(report.figures.get(split))} for split in report.findings],
        "findings": [asdict(finding) for findings in report.findings.values() for finding in findings],
    }


def _figures(figures: Figures | None) -> dict[str, Any]:
    if figures is None:
        return {}
    of_classes = {
        name: dict(zip(BAND_NAMES, bands, strict=True)) for name, bands in figures.num_boxes_by_band.items()
    }
    return {
        "images": figures.num_images,
        "empty_images": figures.num_empty,
        "boxes": figures.num_boxes,
        "most_boxes_in_an_image": figures.most_boxes,
        "boxes_by_class_and_resized_side_px": of_classes,
    }


def _describe(split: str, figures: Figures, settings: CheckSettings) -> Iterator[str]:
    queries = "" if settings.num_queries is None else f" for {settings.num_queries} queries"
    empty_share = figures.num_empty / figures.num_images
    yield (
        f"{printable(split)}: {figures.num_images} images, {empty_share:.1%} of them empty; "
        f"{figures.num_boxes} boxes, at most {figures.most_boxes} in an image{queries}"
    )
    edges = f"{settings.shortest_edge}/{settings.longest_edge}"
    yield f"  boxes by pixels a side after the resize to {edges}:"
    table = [["", "all", *BAND_NAMES]]
    table += [
        [printable(name), str(sum(bands)), *map(str, bands)]
        for name, bands in figures.num_boxes_by_band.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *counts in table:
        cells = [count.rjust(width) for count, width in zip(counts, widths[1:], strict=True)]
        yield f"    {name.ljust(widths[0])}  {'  '.join(cells)}"
