#!/usr/bin/env python3
"""Report phrases that readers found hard to understand, each with a replacement.

    python scripts/check_english.py [FILE_OR_FOLDER ...]

In Python files it reads comments, strings, docstrings, and the names of functions and classes, in others the
complete text. It prints `file:line: phrase -> replacement` and exits with 1 if it finds any phrase.
"""

import bisect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROSE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "examples")
CODE = ("detr_dist", "tests", "scripts", "configs", "accelerate_configs", "launch", ".ci")
SUFFIXES = {"", ".example", ".md", ".py", ".sbatch", ".sh", ".yaml"}

# Case does not matter; a space also matches a line break. Names that users rely on must pass, such as
# `--pictures`, `evaluation.pictures`, `num_machines` and `figures.json`.
PHRASES = {
    r"(go|goes|going|went) on(?! (an?|the|each|every|all|one|its|gpus?|cpus?)\b)": "continues, resumes",
    r"anew|afresh": "again",
    r"begins? a new run|new run begins": "starts a new run",
    r"(is|are|was|be|stays?|kept|left) whole(?! number)|whole or (not|absent|nothing)": "complete, intact",
    r"torn": "incomplete, corrupt",
    r"told(?! apart)|said": "specified, reported",
    r"be had": "available",
    r"passed over": "skipped",
    r"spoil(t|s|ed)?": "corrupt (files), contains NaN or Inf (values)",
    r"(?<!--pictures )(?<![-./\"'=`])pictures?(?![-/\"'=:`])": "image (data), plot (results)",
    r"(?<!def )(?<![\"'`])figures(?![\"'`]|\.json)": "metrics, measurements",
    r"(?<!def )(?<!state )(?<!virtual )(?<![\"'`])machines?(?![\"'`]| learning)": "node, host",
    r"(an?|the|its|their|what) share|shares? of": "fraction",
    r"remarks?|(an?|any|each|every|no|one|the|these) notices?": "warning",
    r"remembers?|(an?|the|its) optimizer's memory|memory of (an?|the|its) optimizer": "optimizer state",
    r"(?<![\"'`])missed(?![\"'`])": "false negative",
    r"invent(s|ed)?": "false positive (detections), generated (names)",
    r"confused|confusions": "misclassified, confusion matrix",
    r"call(s|ed|ing)? the roll|roll[- ]call": "rendezvous check",
    r"last words": "on_failure",
    r"small talk": "host-side collectives",
    r"(a|the|its) heart": "progress watch",
    r"(a|the|its) guard": "check, context manager",
    r"unkillable": "fault-tolerant",
    r"\*\*(seen|plain)": "observable, standard format",
    r"(is|are|stays?) plain|plain transformers": "standard format",
    r"as if (it|nothing|they) had|robbed of|a night is": "a literal statement of what happens",
    r"(?<=\"\"\")(as|beside|by|local|of|until)": "an imperative sentence: Return ..., Write ...",
}
PATTERNS = [(re.compile(rf"(?<![\w-])({each})(?!\w)", re.IGNORECASE), PHRASES[each]) for each in PHRASES]


def main(arguments: list[str]) -> int:
    num_found = 0
    for path in files(arguments or [str(REPOSITORY / name) for name in (*PROSE, *CODE)]):
        shown = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path
        for line, phrase, replacement in phrases_in(path):
            print(f"{shown}:{line}: {phrase} -> {replacement}")
            num_found += 1
    return int(num_found > 0)


def files(arguments: list[str]) -> Iterator[Path]:
    """Yield the files to check; this one lists the phrases and is left out."""
    for path in map(Path, arguments):
        for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if each.is_file() and each.suffix in SUFFIXES and each.resolve() != Path(__file__).resolve():
                yield each


def phrases_in(path: Path) -> list[tuple[int, str, str]]:
    """Return line, phrase and replacement of each match, by line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = without_code(text)
    words = [(word, n) for n, line in enumerate(text.split("\n"), 1) for word in line.split() if word != "#"]
    ends, joined = [], ""  # a phrase may continue on the next line
    for word, _ in words:
        joined += f"{word} "
        ends.append(len(joined))
    return sorted(
        (words[bisect.bisect_right(ends, match.start())][1], match[0], replacement)
        for pattern, replacement in PATTERNS
        for match in pattern.finditer(joined)
    )


def without_code(source: str) -> str:
    """Blank out names, numbers and f-string fields; keep `def` and `class` with the words of the name."""
    lines = [list(line) for line in source.split("\n")]
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, first), (_, last) = token.start, token.end
        if token.type == tokenize.NAME and previous in ("def", "class"):
            lines[row - 1][first:last] = token.string.replace("_", " ")
        elif token.type in (tokenize.NAME, tokenize.NUMBER) and token.string not in ("def", "class"):
            lines[row - 1][first:last] = " " * (last - first)
        elif token.type == tokenize.STRING and token.string[:1] == "f" and "\n" not in token.string:
            lines[row - 1][first:last] = re.sub(r"{[^{}]*}", lambda each: "-" * len(each[0]), token.string)
        previous = token.string
    text = "\n".join("".join(line) for line in lines)
    return re.sub(r"\"(\s*\n\s*)[fr]?\"(?!\")", r"\1", text)  # strings that continue on the next line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
