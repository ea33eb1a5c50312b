"""The same questions to several language models and KV cache types, with one encoder pass for each picture."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qap_gguf.errors import ConfigError
from qap_gguf.eval.data import Question
from qap_gguf.eval.journal import EmbeddingFolder, Journal
from qap_gguf.eval.methods import Variant
from qap_gguf.eval.runner import MAX_TOKENS, Outcome, Report, Setup, evaluate

OpenModel = Callable[[Setup], AbstractContextManager[Any]]


class _Finished:
    """Stands for a model that has nothing left to do: whoever calls it is mistaken."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of a model that is not open")


def _is_finished(journal: Journal, setup: Setup, questions: Sequence[Question], variants: Sequence[Variant]) -> bool:
    return all(
        journal.get(setup, variant, number, question) is not None
        for number, question in enumerate(questions)
        for variant in variants
    )


def evaluate_grid(
    open_model: OpenModel,
    setups: Sequence[Setup],
    questions: Sequence[Question],
    variants: Sequence[Variant],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Report | None = None,
    journal: Journal | None = None,
) -> list[Outcome]:
    """Run :func:`evaluate` for each setup, one model open at a time.

    Args:
        open_model: gives the VisionModel of a setup for a `with` block; all have the same image encoder.
        setups: at least one, all different.
        questions, variants, max_tokens: see :func:`evaluate`.
        progress: called as progress(done, total), over the questions of all setups.
        journal: what is recorded there is not asked again; a setup that is complete is not opened.

    Returns:
        The outcomes, setup by setup.

    Raises:
        ConfigError: no setups, or one twice.
    """
    if not setups or len(set(setups)) != len(setups):
        raise ConfigError(f"expected model files and KV types that differ, got {list(setups)}; name each once")
    total = len(setups) * len(questions)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="qap_gguf-eval-") as folder:
        embeddings = EmbeddingFolder(Path(folder)) if len(setups) > 1 else None
        for i, setup in enumerate(setups):

            def step(done: int, _: int, before: int = i * len(questions)) -> None:
                if progress is not None:
                    progress(before + done, total)

            settings: dict[str, Any] = {"max_tokens": max_tokens, "progress": step, "setup": setup, "journal": journal}
            if journal is not None and _is_finished(journal, setup, questions, variants):
                outcomes += evaluate(_Finished(), questions, variants, **settings)
                continue
            with open_model(setup) as model:
                outcomes += evaluate(model, questions, variants, embeddings=embeddings, **settings)
    return outcomes
