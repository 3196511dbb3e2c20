"""The fast reader of large annotation files against the exact one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_dist.data import coco
from detr_dist.data.column_records import ColumnRecords
from detr_dist.data.formats import coco_json, json_stream
from detr_dist.data.formats.annotations import Annotations
from detr_dist.data.formats.coco_json import read_document
from detr_dist.data.formats.json_stream import stream_document
from detr_dist.data.records import check_records
from detr_dist.errors import DataError

Document = dict[str, Any]

NUMBERS = ["0", "-0", "0.0", "-0.0", "1", "3", "7", "1.5", "1e2", "1E-7", "0.1e-400", "12345678901234567890"]
NUMBERS += ["9007199254740993", "-5", "9223372036854775807", "9223372036854775808", "1e999", "1e400", "1e19"]
ODD = ["null", "true", "false", '"7"', "[]", "{}", "[1]", '{"a": 1}', "NaN", "Infinity", "-Infinity", "Inf"]
BROKEN = [
    "01",
    "1.",
    ".5",
    "+1",
    "-",
    "tru",
    "'1'",
    "1 2",
    "[1,]",
    '{"a": 1, "a": 2}',
    '{"a": 1, "a": 1}',
    "",
]
TEXTS = [
    '"a.jpg"',
    '"\\u00e9/\\"7\\".jpg"',
    '"é.jpg"',
    '"\\\\"',
    '"{[,:]}"',
    '"\\ud83d\\ude00"',
    '"\\ud800"',
    '""',
]
TEXTS += ['"a\\/b"', '"IN"', '"\\udc80"', '"\t"', '"\\x"', '"a\\nb"', '"', '"\\\\\\""']
KEYS = [
    "score",
    "a very long name of an attribute, longer than a word",
    "a very long name of an attribute",
    "i\\u0064",
]
KEYS += ["origin", "id", "segmentation", "area", "x" * 8, "x" * 9, ""]
SEGMENTATIONS = [
    "[]",
    "[[1, 2.5, 3, 4]]",
    '{"counts": "a[b", "size": [3, 4]}',
    '{"size": 1, "size": 2}',
    "[[[[1]]]]",
]


class Writer:
    """Writes COCO files that are nearly right, from random choices."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.oddity = float(self.rng.choice([0, 0, 0.003, 0.02, 0.1]))

    def one_of(self, *values: str) -> str:
        return values[int(self.rng.integers(len(values)))]

    def number(self, usual: str) -> str:
        if self.rng.random() >= self.oddity:
            return usual
        return self.one_of(*NUMBERS, *ODD, *BROKEN, *TEXTS)

    def space(self) -> str:
        return self.one_of("", "", "", " ", "\n", "\r\n  ", "\t") if self.oddity else self.one_of("", " ")

    def object(self, pairs: list[tuple[str, str]]) -> str:
        if self.rng.random() < self.oddity:
            pairs = [pair for pair in pairs if self.rng.random() > 0.1]
        if self.rng.random() < self.oddity:
            pairs += [(self.one_of(*KEYS), self.number(self.one_of(*NUMBERS, *ODD))) for _ in range(2)]
        if self.rng.random() < self.oddity and pairs:
            pairs.append(pairs[int(self.rng.integers(len(pairs)))])
        if self.rng.random() < 0.5 * self.oddity:
            return self.one_of("5", "null", "[]", '"{}"', "{}", "{]", "}{")
        colon = self.space() + ":" + self.space()
        return "{" + f"{self.space()},".join(f'"{key}"{colon}{value}' for key, value in pairs) + "}"

    def image(self, number: int) -> str:
        name = self.one_of(*TEXTS) if self.rng.random() < self.oddity else f'"{number}.jpg"'
        pairs = [("id", self.number(str(number))), ("file_name", name)]
        pairs += [(side, self.number(self.one_of("40", "60"))) for side in ("height", "width")]
        return self.object([*pairs, ("license", "3"), ("flickr_url", '"http://x/y"')])

    def annotation(self, number: int) -> str:
        numbers = [f"{value:.{self.rng.integers(3)}f}" for value in self.rng.uniform(0, 45, 4)]
        box = "[" + f",{self.space()}".join(self.number(each) for each in numbers) + "]"
        pairs = [("id", self.number(str(number))), ("image_id", self.number(self.one_of("0", "1", "2")))]
        pairs += [("category_id", self.number(self.one_of("1", "2"))), ("bbox", self.number(box))]
        if self.rng.random() < 0.8:
            pairs += [("area", self.number(f"{self.rng.uniform(0, 99):.3f}")), ("iscrowd", self.number("0"))]
        if self.rng.random() < 0.5:
            pairs.append(("segmentation", self.one_of(*SEGMENTATIONS[: 5 if self.oddity else 3])))
        return self.object(pairs)

    def list(self, make: Callable[[int], str], count: int) -> str:
        comma = self.space() + "," + self.space()
        if self.rng.random() < self.oddity:
            comma = self.one_of(",,", " ", ";", ", ,")
        end = "," if self.rng.random() < 0.3 * self.oddity else ""
        return "[" + self.space() + comma.join(map(make, range(count))) + end + self.space() + "]"

    def document(self) -> bytes:
        categories = '[{"id": 1, "name": "ball", "supercategory": "none"}, {"id": 2, "name": "player"}]'
        pairs = [
            ("info", self.number(self.one_of('{"year": 2020}', '"text, with } and \\" in it"', "1", "null"))),
            ("images", self.number(self.list(self.image, 3))),
            ("annotations", self.number(self.list(self.annotation, int(self.rng.integers(0, 30))))),
            ("categories", self.number(categories)),
        ]
        self.rng.shuffle(pairs)
        end = self.one_of("x", "}", ",", "{}") if self.rng.random() < 0.2 * self.oddity else self.space()
        text = self.space() + self.object(pairs) + end
        if self.rng.random() < 0.1 * self.oddity:
            text = text[: int(self.rng.integers(len(text)))]
        encoded = text.encode()
        if self.rng.random() < 0.1 * self.oddity:
            encoded = self.rng.choice([b"\xef\xbb\xbf", b"\xff"]) + encoded
        return encoded


def outcome(path: Path, document: Any) -> tuple[list[str], list[list[Any]]]:
    """Return all findings, and all columns down to the sign of zero."""
    records = check_records(Annotations(path, path.parent, document), check_files=False)
    columns = [getattr(records, name) for name in records.__slots__]
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    texts = [str(finding) for finding in records.findings] + records.listed_files
    return texts + [str(category) for category in records.categories], [
        [array.dtype.str, array.shape, array.tobytes()] for array in arrays
    ]


@pytest.mark.parametrize("block_bytes", [300, 2**24])
def test_the_fast_reader_gives_what_the_exact_one_gives_or_leaves_it_to_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(json_stream, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(json_stream, "_MOST_BLOCKS", 1000)
    path, num_fast, num_refused = tmp_path / "a.json", 0, 0
    for seed in range(250):
        path.write_bytes(Writer(seed).document())
        streamed = stream_document(path)
        num_fast += streamed is not None
        try:
            exact = read_document(path)
        except (DataError, ValueError):  # ValueError: a number of thousands of digits
            num_refused += 1
            assert streamed is None, f"seed {seed}: accepted what the exact reader refuses"
            continue
        if streamed is not None:
            assert isinstance(streamed["annotations"], ColumnRecords)
            assert outcome(path, streamed) == outcome(path, exact), f"seed {seed}"
    assert num_fast > 70, num_fast
    assert num_refused > 50, num_refused


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_usual_files_are_read_fast(
    tmp_path: Path, document: Document, indent: int | None, ascii_only: bool
) -> None:
    document["images"][0] |= {
        "file_name": 'é "7".jpg',
        "license": 1,
        "coco_url": "http://x",
        "flickr_url": "y",
    }
    document["annotations"][0] |= {
        "segmentation": [[1, 2, 3.5, 4]],
        "attributes": {"occluded": False, "z": 1},
    }
    document["annotations"][1] |= {
        "segmentation": {"counts": "a]}\\", "size": [1, 2]},
        "note": 'he wrote "no"',
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    streamed = stream_document(path)
    assert streamed is not None
    assert outcome(path, streamed) == outcome(path, read_document(path))


def test_records_look_like_dictionaries(tmp_path: Path, document: Document) -> None:
    path = tmp_path / "a.json"
    document["annotations"][0]["segmentation"] = [[1, 2]]
    path.write_text(json.dumps(document))
    streamed = stream_document(path)
    assert streamed is not None
    images, annotations = streamed["images"], streamed["annotations"]
    assert list(images) == document["images"]
    del document["annotations"][0]["segmentation"]
    expected = [{"iscrowd": 0} | each for each in document["annotations"]]
    assert [dict(each) | {"iscrowd": each.get("iscrowd", 0)} for each in annotations[1:]] == expected[1:]


def test_faults_of_a_large_file_are_reported_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: Document
) -> None:
    document["annotations"][1]["image_id"], document["annotations"][2]["bbox"] = 99, [1, 2, -3, 4]
    document["images"].append(document["images"][0])
    (tmp_path / "a.json").write_text(json.dumps(document))
    path = tmp_path / "a.json"
    streamed = stream_document(path)
    assert streamed is not None
    assert outcome(path, streamed) == outcome(path, read_document(path))
    monkeypatch.setattr(coco_json, "LARGE_BYTES", 0)
    with pytest.raises(DataError, match=r"1 image with the id of an earlier .*images\[3\] \(id 7\)"):
        coco.load_data(tmp_path, check_files=False)
