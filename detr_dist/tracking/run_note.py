"""The note of a run, in Markdown, which MLflow shows at the top of its page."""

import hashlib
import re
from collections.abc import Mapping, Sequence

from detr_dist.redaction import redact
from detr_dist.text import shorten
from detr_dist.tracking.store import MAX_TAG_LENGTH, acceptable

_MARK = re.compile(r"\n<!-- written by detr-dist ([0-9a-f]{8}) -->\s*\Z")  # hidden in the rendered page
_MAX_COMMAND = 1500


def run_note(
    run_id: str, *, command: str, data: Sequence[str], best: str, metrics: Mapping[str, float]
) -> str:
    """Return the note of a run.

    Args:
        run_id: The run.
        command: The command that started it.
        data: A line for each data set.
        best: The best model so far, on one line.
        metrics: Metrics to list, of the last evaluation.
    """
    rows = "\n".join(f"| `{name}` | {value:.4f} |" for name, value in metrics.items())
    sources = "\n".join(f"- {line}" for line in data)
    text = f"""## Detector

{best}

| last evaluation | |
|---|---|
{rows}

### Data

{sources}

### Load the best model

```python
import mlflow.pyfunc

detector = mlflow.pyfunc.load_model("runs:/{run_id}/model")
found = detector.predict({{"image": ["match.jpg"]}})
```

### Serve it

```bash
mlflow models serve -m runs:/{run_id}/model --env-manager local
```

### Command

```bash
{shorten(command, _MAX_COMMAND)}
```
"""
    body = acceptable(redact(text), MAX_TAG_LENGTH - 100)  # a later change would look like that of a person
    return f"{body}\n<!-- written by detr-dist {_digest(body)} -->"


def is_ours(note: str) -> bool:
    """Return whether a note is as this package has written it, so that it may be replaced."""
    match = _MARK.search(note)
    return not note.strip() or (match is not None and _digest(note[: match.start()]) == match[1])


def _digest(body: str) -> str:
    return hashlib.sha256(body.strip().encode()).hexdigest()[:8]
