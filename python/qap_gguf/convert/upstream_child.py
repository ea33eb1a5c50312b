"""Runs llama.cpp's converter in a process of its own: python upstream_child.py FOLDER PRE RUN...

Each RUN is the list of one run's arguments as JSON; one process serves both files, for importing torch takes longer
than most conversions. `qap-run N` goes to stderr before run N, from 0.
FOLDER holds convert_hf_to_gguf.py. PRE is llama.cpp's name of the pre-tokenizer as bpe.py read it from tokenizer.json,
or "" where it could not. The converter knows tokenizers by a hash of some ids, so it refuses one whose vocabulary was
changed or trained anew; then PRE is taken, which was found from what the tokenizer does.
One defect of it is mended, see `keep_row_break`. This file is run by its path and imports nothing of this package.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any


def keep_row_break(pixtral: Any) -> None:
    """Lets Pixtral's class see the language model's embeddings, out of which it takes that of [IMG_BREAK].

    All encoders' tensors go through a filter that drops names with "language_model.", so with the names that published
    checkpoints have, the embedding was missing, and libmtmd refuses a file without it.
    """
    known = pixtral.filter_tensors

    def filter_tensors(_: Any, item: tuple[str, Any]) -> tuple[str, Any] | None:
        kept: tuple[str, Any] | None = item if item[0].endswith("embed_tokens.weight") else known(item)
        return kept

    pixtral.filter_tensors = classmethod(filter_tensors)


def main(folder: str, pre: str, *runs: str) -> None:
    print("qap-run 0", file=sys.stderr, flush=True)  # before the long import: the caller hears that something happens
    # The first place is this file's own folder, whose modules are not meant.
    sys.path[0] = folder
    sys.path.insert(1, str(Path(folder) / "gguf-py"))
    base: Any = importlib.import_module("conversion.base")
    known = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(model: Any, tokenizer: Any) -> str:
        try:
            return str(known(model, tokenizer))
        except NotImplementedError:
            if not pre:
                raise
            return pre

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre
    keep_row_break(importlib.import_module("conversion.llava").LlavaVisionModel)
    script = Path(folder) / "convert_hf_to_gguf.py"
    for number, arguments in enumerate(runs):
        if number:
            print(f"qap-run {number}", file=sys.stderr, flush=True)
        sys.argv = [script.name, *json.loads(arguments)]
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
