#!/usr/bin/env python3
"""Run the notebook examples/tour.ipynb afresh, and keep its outputs small.

    python tools/demo/run_tour.py            # run it and write the outputs into the file
    python tools/demo/run_tour.py --check    # run it; exit 1 unless it shows what the file says it shows

A reader on a forge sees the notebook as it is stored, so the outputs stay in it: as text, or as PNG with a palette.
``--check`` compares the texts, and that each cell which showed a picture shows one again.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

TOUR = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"
COLOURS = 128
MAX_BYTES = 300_000


def run(path: Path) -> Any:
    """The notebook with new outputs, run in an empty folder."""
    notebook: Any = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    return notebook


def small_png(data: str) -> str:
    """A base64 PNG with a palette."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def slim(notebook: Any) -> None:
    """Keep what a reader sees: one form of each output, and no times of execution."""
    for cell in notebook.cells:
        cell.metadata = {}
        printed = [output for output in cell.get("outputs", []) if output.output_type == "stream"]
        if printed:  # they come in as many pieces as the kernel happened to send
            printed[0].text = "".join(output.text for output in printed)
            cell.outputs = [output for output in cell.outputs if output not in printed[1:]]
        for output in cell.get("outputs", []):
            if output.output_type in ("display_data", "execute_result"):
                output.metadata = {}
                if "image/png" in output.data:
                    output.data = {"image/png": small_png(output.data["image/png"])}
                else:
                    output.data = {"text/plain": output.data["text/plain"]}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def shown(notebook: Any) -> list[list[str]]:
    """For each cell, what it shows: what it printed, then its value, or a word for a picture."""
    cells: list[list[str]] = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        printed = "".join(output.text for output in outputs if output.output_type == "stream")
        values = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
        words = ["a picture" if "image/png" in data else str(data["text/plain"]) for data in values]
        cells.append([word.strip() for word in (printed, *words) if word.strip()])
    return cells


def main(argv: list[str] | None = None) -> int:
    """Run it, then write or compare."""
    parser = argparse.ArgumentParser(description="Run examples/tour.ipynb.")
    parser.add_argument("--check", action="store_true", help="compare with the stored outputs, write nothing")
    args = parser.parse_args(argv)
    notebook = run(TOUR)
    if args.check:
        stored: Any = nbformat.read(TOUR, as_version=4)
        wrong = [n for n, pair in enumerate(zip(shown(stored), shown(notebook), strict=True), 1) if pair[0] != pair[1]]
        for number in wrong:
            before, after = shown(stored)[number - 1], shown(notebook)[number - 1]
            print(f"cell {number}: expected {before}, got {after}; run tools/demo/run_tour.py", file=sys.stderr)
        return 1 if wrong else 0
    slim(notebook)
    nbformat.write(notebook, TOUR)
    size = TOUR.stat().st_size
    print(f"{TOUR.name}: {size} bytes")
    return 1 if size > MAX_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
