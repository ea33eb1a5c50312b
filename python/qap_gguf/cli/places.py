"""`--positions keep` on a file whose image tokens cannot keep their places: a relabelled copy, made once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qap_gguf.cli.common import note
from qap_gguf.cli.progress import progress_bar, stops_cleanly


def keeping(model: Path, prune: Mapping[str, Any]) -> Path:
    """The file to load for the prune options: `model`, or its relabelled copy in the cache folder for --positions keep.

    A note says where the copy lies; it is made at the first call only.

    Raises:
        ConvertError: the model cannot be relabelled, or there is no room for the copy.
    """
    if prune.get("positions") != "keep":
        return model
    from qap_gguf.convert.relabel.cache import relabelled_copy
    from qap_gguf.files.gguf import check_language
    from qap_gguf.files.trial import check_trial

    check_language(model, memory=False)
    check_trial(None, model)
    with stops_cleanly(), progress_bar() as report:
        copy = relabelled_copy(model, report)
    if copy != model:
        note(f"--positions keep: {copy} is {model.name}, relabelled")
    return copy
