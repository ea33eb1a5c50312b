"""The files that an evaluation leaves in a folder: numbers as CSV and JSON, tables as Markdown, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qap_gguf.errors import DataError, UnsupportedError
from qap_gguf.eval.curve import draw
from qap_gguf.eval.report import Evaluation, markdown
from qap_gguf.files.atomic import replacing


def write_results(out: Path, result: Evaluation, plain: dict[str, Any]) -> str | None:
    """Write results.csv, results.json, results.md and, where something was pruned, accuracy.png.

    Args:
        out: a folder; made where it is missing. Files of these names are replaced, each whole or not at all.
        result: what the tables and the plot show.
        plain: the JSON, such as ``result.to_dict()`` and what it was made from.

    Returns:
        Why there is no plot, in one line; None where there is one or nothing to plot.

    Raises:
        DataError: the folder cannot be written to.
    """
    tables = [result.main_table(), result.kind_table(), result.yes_no_table()]
    parts = [markdown(table) for table in tables if table[1]]
    parts.insert(1, result.note)
    if result.interactions:
        parts += [result.interaction_note, markdown(result.interaction_table())]
    texts = {
        "results.csv": result.csv(),
        "results.json": json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n",
        "results.md": "\n\n".join(parts) + "\n",
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            with replacing(out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        if any(summary.variant.budget is not None for summary in result.summaries):
            draw(result, out / "accuracy.png")
    except OSError as err:
        raise DataError(f"expected to write to {out}, got a refusal ({err.strerror}); choose another folder") from err
    except UnsupportedError as err:
        return f"no accuracy.png: {err}"
    return None
