"""Wrong and unusual use of a VisionModel: settings out of range, closing, abandoned and interleaved answers."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.errors import ArrayError, ConfigError, ImageError, QapError

Refuse = Callable[..., str]
QUESTION = "How many objects are there?"
LIST = "List the objects in row order."


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text.strip()
    assert "\n" not in text
    return text


def ask(vlm: qap.VisionModel, image: Any, question: str = QUESTION, **settings: Any) -> str:
    text: str = vlm.generate([image, question], **{"max_tokens": 8, **settings})
    return text


# --- K ---


def test_k_above_the_image_keeps_all_of_it(vlm: qap.VisionModel, sample: qap.ImageEmbedding) -> None:
    dense = ask(vlm, sample, prune=None)
    for k in (145, 2**31 - 1):
        assert ask(vlm, sample, prune=qap.PruneConfig(n_keep=k)) == dense
        assert len(vlm.prune(sample, qap.PruneConfig(n_keep=k)).indices) == 144
    with pytest.raises(ConfigError, match="n_keep"):
        qap.PruneConfig(n_keep=0)


def test_k_of_zero_is_wrong_usage(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("-p", "x", "--n-keep", "0")
    assert done.returncode == 2
    assert "--n-keep" in done.stderr


def test_extreme_k_answer(vlm: qap.VisionModel, sample: qap.ImageEmbedding) -> None:
    dense = ask(vlm, sample, prune=None)
    assert ask(vlm, sample, prune=qap.PruneConfig(n_keep=144)) == dense
    assert ask(vlm, sample, prune=qap.PruneConfig(keep_ratio=1.0)) == dense
    assert ask(vlm, sample, prune=qap.PruneConfig(n_keep=1)) != ""


# --- prompts ---


def test_a_prompt_with_the_media_marker(vlm: qap.VisionModel, sample: qap.ImageEmbedding, refused: Refuse) -> None:
    text = f"What is {_core.media_marker()} here?"
    with pytest.raises(ConfigError, match="reserved marker") as error:
        ask(vlm, sample, text)
    one_line(error)
    with pytest.raises(ConfigError, match="reserved marker"):
        vlm.generate([text])
    assert "reserved marker" in refused("-p", text)


def test_a_prompt_longer_than_the_context(
    vlm: qap.VisionModel, sample: qap.ImageEmbedding, refused: Refuse, answer: str
) -> None:
    with pytest.raises(ConfigError, match="n_ctx") as error:
        ask(vlm, sample, "What is it? " * 1000)
    assert "2048" in one_line(error)
    assert "n_ctx" in refused("--ctx", "100", "--dense")
    assert ask(vlm, sample) == answer  # the model is as good as before


def test_pictures_that_cannot_fit_are_not_encoded(vlm: qap.VisionModel) -> None:
    """15 of 144 tokens for 2,048 cells."""
    before = vlm.n_encodes
    pictures = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(15)]
    with pytest.raises(ConfigError, match="n_ctx"):
        vlm.generate([*pictures, LIST], prune=None)
    assert vlm.n_encodes == before


def test_a_short_context_ends_the_answer(packaged: qap.PackagedModel) -> None:
    with qap.VisionModel(n_ctx=256, n_threads=1) as vlm:
        image = vlm.encode(packaged.sample)
        pieces = vlm.generate([image, LIST], prune=qap.PruneConfig(n_keep=4), max_tokens=1000, stream=True)
        assert isinstance("".join(pieces), str)
        assert pieces.stats.n_kv <= 256
        with pytest.raises(ConfigError, match="256"):
            vlm.generate([image, image, LIST], prune=None)


def test_small_batches_change_no_answer(packaged: qap.PackagedModel, answer: str) -> None:
    answers = set()
    for n_batch in (1, 7, 64, 512):
        with qap.VisionModel(n_batch=n_batch, n_threads=1) as vlm:
            answers.add(ask(vlm, packaged.sample))
    assert answers == {answer}


@pytest.mark.parametrize("text", ["", "\U0001f436" * 50, "<|im_end|>" * 5, "\n" * 20, "{{ x }}{% raw %}"])
def test_unusual_texts(vlm: qap.VisionModel, sample: qap.ImageEmbedding, text: str) -> None:
    assert isinstance(ask(vlm, sample, text), str)


@pytest.mark.parametrize("text", ["\0", "a\0b"])
def test_null_characters_are_refused(vlm: qap.VisionModel, sample: qap.ImageEmbedding, text: str) -> None:
    with pytest.raises(ConfigError, match="null character") as error:
        ask(vlm, sample, text)
    one_line(error)


def test_text_that_is_not_unicode(vlm: qap.VisionModel, sample: qap.ImageEmbedding) -> None:
    with pytest.raises(ConfigError, match="surrogate") as error:
        ask(vlm, sample, "caf\udce9")
    one_line(error)


BAD_PARTS: dict[str, Any] = {
    "a text": "What?", "bytes": b"x", "a path": Path("x.png"), "None": None, "a dict": {"a": 1}, "a number": 3,
}  # fmt: skip
BAD_MESSAGES: dict[str, Any] = {
    "none": [], "no role": [{"content": "a"}], "a text": "hello", "numbers": [3],
}  # fmt: skip


def test_malformed_messages(vlm: qap.VisionModel) -> None:
    for parts in BAD_PARTS.values():
        with pytest.raises(ConfigError, match=r"^parts: ") as error:
            vlm.generate(parts)
        one_line(error)
    for messages in BAD_MESSAGES.values():
        with pytest.raises(ConfigError, match=r"^messages: ") as error:
            vlm.chat(messages)
        one_line(error)


# --- settings ---

BAD_SETTINGS: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": 1.0}, {"temperature": -1}, {"temperature": float("nan")},
    {"temperature": float("inf")}, {"temperature": True}, {"temperature": "0"}, {"top_k": -1}, {"top_k": 1.5},
    {"top_p": 1.1}, {"top_p": "a"}, {"min_p": None}, {"min_p": float("nan")}, {"stop": [""]}, {"stop": [3]},
    {"stop": 3},
    {"prune": {}}, {"prune": 18}, {"prune": "x"},
]  # fmt: skip


@pytest.mark.parametrize("setting", BAD_SETTINGS, ids=str)
def test_settings_out_of_range(vlm: qap.VisionModel, sample: qap.ImageEmbedding, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        ask(vlm, sample, **setting)
    name = next(iter(setting))
    assert (name if name != "prune" else "PruneConfig") in one_line(error)


BAD_ARGUMENTS: list[dict[str, Any]] = [
    {"n_ctx": 0}, {"n_ctx": True}, {"n_ctx": 2048.0}, {"n_batch": 0}, {"seed": -1}, {"seed": 2**40}, {"device": "none"},
    {"device": 3}, {"n_threads": 0}, {"n_threads": True}, {"flash_attn": "yes"}, {"mmproj": "a"}, {"model": "a"},
]  # fmt: skip


@pytest.mark.parametrize("argument", BAD_ARGUMENTS, ids=str)
def test_arguments_out_of_range(argument: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        qap.VisionModel(**argument)
    assert next(iter(argument)) in one_line(error)


def test_one_stop_text_is_not_its_letters(vlm: qap.VisionModel, sample: qap.ImageEmbedding, answer: str) -> None:
    stop = answer[1:3]
    before = answer[: answer.index(stop)]
    assert ask(vlm, sample, stop=stop) == ask(vlm, sample, stop=[stop]) == before
    assert ask(vlm, sample, stop="#" + answer[-1]) == answer


def test_embeddings_that_the_caller_changed(vlm: qap.VisionModel, sample: qap.ImageEmbedding, answer: str) -> None:
    x, attention = sample.features, sample.attention
    assert attention is not None
    changes: list[tuple[dict[str, Any], type[QapError]]] = [
        ({"features": x[:, :100].copy()}, ImageError),
        ({"features": x.astype(np.float64)}, ArrayError),
        ({"features": np.asfortranarray(x)}, ArrayError),
        ({"features": x[:0]}, ArrayError),
        ({"features": x[:100].copy()}, ImageError),
        ({"features": np.concatenate([x, x])}, ImageError),
        ({"features": x * np.float32(np.nan)}, ArrayError),
        ({"attention": attention[:5].copy()}, ArrayError),
        ({"attention": attention * np.float32(np.inf)}, ArrayError),
    ]
    for change, kind in changes:
        with pytest.raises(kind) as error:
            ask(vlm, dataclasses.replace(sample, **change), prune=qap.PruneConfig(n_keep=18))
        one_line(error)
    with pytest.raises(ImageError, match="expected 144 rows, got 100"):
        ask(vlm, dataclasses.replace(sample, features=x[:100].copy()))
    with pytest.raises(ImageError, match="encode"):
        vlm.prune(x)  # type: ignore[arg-type]
    assert ask(vlm, sample) == answer
