"""Likelihoods of choices against the logits of whole prompts, and multiple choice from the file to the table."""

from __future__ import annotations

import numpy as np
import pytest

import qap_gguf as qap
import qap_gguf.eval as qe
from qap_gguf.errors import ConfigError
from qap_gguf.language.likelihood import likelihoods

TEXTS = ["four", "row 2, column 3", "two", "row 2, column 1"]
QUESTION = "How many objects are there?"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return np.asarray(wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max())


def test_likelihoods_are_those_of_reading_token_by_token() -> None:
    with qap.VisionModel(n_threads=1) as vlm:
        image = vlm.encode(qap.packaged_model().sample)
        llama = vlm.language_model

        def ask() -> None:
            vlm.generate([image, QUESTION], prune=qap.PruneConfig(n_keep=36), stream=True)

        expected = []
        for text in TEXTS:
            ask()
            tokens, total = llama.tokenize(text.encode(), add_bos=False), 0.0
            for token in tokens:
                total += float(log_softmax(vlm.last_logits())[token])
                llama.eval([token])
            expected.append(total / len(tokens))
        ask()
        before = llama.n_tokens
        found = likelihoods(llama, TEXTS)
        assert llama.n_tokens == before
        assert found == pytest.approx(expected, rel=1e-4)
        ask()
        assert likelihoods(llama, TEXTS[::-1]) == pytest.approx(expected[::-1], rel=1e-4)
        for wrong in ([], [""]):
            with pytest.raises(ConfigError, match="at least one token"):
                likelihoods(llama, wrong)


def test_a_choice_that_does_not_fit_the_context_is_one_line() -> None:
    with qap.VisionModel(n_threads=1, n_ctx=192, mmproj=None) as vlm:
        image = vlm.encode(qap.packaged_model().sample)
        vlm.generate([image, QUESTION], prune=None, stream=True)
        with pytest.raises(ConfigError, match="raise n_ctx"):
            likelihoods(vlm.language_model, ["row " * 60])


def test_multiple_choice_takes_the_likeliest() -> None:
    sample = qap.packaged_model().sample
    choices = ("two", "four", "six")
    asked = [qe.Question(sample, QUESTION, "four", choices=choices, scoring="choice")]
    with qap.VisionModel(n_threads=1) as vlm:
        dense, pruned = qe.evaluate(vlm, asked, qe.variants(["dense", "qap"], [qe.Budget(n_keep=1)]))
    assert dense.said == ("four",)
    assert dense.share_right == 1
    assert pruned.said[0] in choices
