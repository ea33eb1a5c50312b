"""The method resize: the size that is chosen, what the model reads, and what an encoder of one size says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qap_gguf as qap
from eval.test_eval import ScriptedModel
from qap_gguf import eval as qe
from qap_gguf.errors import ConfigError
from qap_gguf.eval import runner
from qap_gguf.eval.smaller import SmallerPictures, fitting_size


@given(st.integers(16, 3000), st.integers(16, 3000), st.integers(300, 4000))
def test_the_largest_picture_of_the_same_shape_that_fits(width: int, height: int, n_keep: int) -> None:
    def count(size: tuple[int, int]) -> int:
        return -(-size[0] // 28) * -(-size[1] // 28)

    found = fitting_size((width, height), n_keep, count)
    assert found is not None  # 16 x 3000 has 108 tokens
    assert count(found) <= n_keep
    assert found[0] <= width
    assert found[1] <= height
    assert abs(found[0] * height - found[1] * width) <= max(width, height)  # each side is rounded
    if found != (width, height):
        larger = round(found[0] * 1.02) + 1, round(found[1] * 1.02) + 1
        assert count(larger) > n_keep or larger[0] > width


def test_an_encoder_of_one_size_names_the_other_baseline() -> None:
    with qap.VisionModel(n_threads=1) as vlm, SmallerPictures(vlm) as smaller:
        sample = qap.packaged_model().sample
        assert smaller.encode(sample, 144).n_tokens == 144
        with pytest.raises(ConfigError, match=r"^resize: expected a model that makes at most 36 .*144.*; use pool as"):
            smaller.encode(sample, 36)


class SizedModel(ScriptedModel):
    """Reads all tokens of the embedding that it is given."""

    def generate(self, parts: Any, *, prune: Any, max_tokens: int, temperature: float, stream: bool) -> Any:
        generation = super().generate(parts, prune=prune, max_tokens=max_tokens, temperature=temperature, stream=stream)
        if prune is None:
            generation.stats.n_image_kept = parts[0].n_tokens
        return generation


def test_all_tokens_of_the_smaller_picture_are_read_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, int]] = []

    class Smaller(SmallerPictures):
        def encode(self, image: Any, n_keep: int) -> Any:
            asked.append((image, n_keep))
            whole = self._model.encode(image)
            return dataclasses.replace(whole, n_tokens=n_keep - 2)

    monkeypatch.setattr(runner, "SmallerPictures", Smaller)
    picture = tmp_path / "a.png"
    picture.touch()
    questions = [qe.Question(picture, text, "yes") for text in ("first?", "second?")]
    rows = qe.variants(["dense", "resize"], [qe.Budget(n_keep=18)], encoder_keeps=[1.0, 0.5])
    assert [row.label for row in rows] == ["dense", "resize"]  # nothing is dropped early of it
    outcomes = qe.evaluate(SizedModel({"first?": "yes", "second?": "yes"}), questions, rows)
    kept = [(outcome.variant.method, outcome.n_kept) for outcome in outcomes]
    assert kept == [("dense", 144)] * 2 + [("resize", 16)] * 2
    assert asked == [(picture, 18)]  # once for all questions
