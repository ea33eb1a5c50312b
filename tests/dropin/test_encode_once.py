"""Stock handlers encode a picture once, whatever is asked and however it is pruned (native/src/hooks-cache.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_chat_format import Llava15ChatHandler
from PIL import Image

import qap_gguf as qap
from qap_gguf import _core

FILES = qap.packaged_model()
QUESTIONS = [f"What is in row {row}, column {column}?" for row in (1, 2, 3) for column in (1, 2, 3)]
CONFIGS: list[qap.PruneConfig | None] = [
    None,
    qap.PruneConfig(n_keep=18),
    qap.PruneConfig(n_keep=18, select="topk", alpha=0.2),
    qap.PruneConfig(n_keep=36, select="random", seed=3),
    qap.PruneConfig(n_keep=18, semantic="attention", select="divprune"),
    qap.PruneConfig(n_keep=20, merge="average"),
    qap.PruneConfig(n_keep=18, error="q4_0", alpha="dynamic"),
]


class Stock:
    """llama-cpp-python's own LLaVA handler with the packaged model."""

    def __init__(self) -> None:
        self.handler = Llava15ChatHandler(clip_model_path=str(FILES.mmproj), verbose=False)
        self.llama = llama_cpp.Llama(
            str(FILES.model), chat_handler=self.handler, n_ctx=512, n_threads=1, logits_all=True, verbose=False
        )

    def ask(self, url: str, question: str, cfg: qap.PruneConfig | None = None) -> tuple[str, list[Any]]:
        """The answer, and the probabilities of its tokens."""
        content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        with qap.use(cfg):
            found: Any = self.llama.create_chat_completion(
                [{"role": "user", "content": content}], temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
            )
        choice = found["choices"][0]
        return choice["message"]["content"], choice["logprobs"]["content"]

    @property
    def state(self) -> dict[str, int]:
        """What the encoder keeps."""
        context: Any = self.handler.mtmd_ctx
        address = ctypes.cast(context, ctypes.c_void_p).value
        assert address is not None
        return _core.image_cache_state(address)

    def close(self) -> None:
        """Free both: the handler goes with the model."""
        self.llama.close()


@pytest.fixture
def stock() -> Iterator[Stock]:
    qap.set_image_cache(None)
    found = Stock()
    yield found
    found.close()
    qap.set_image_cache(None)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The sample, and pictures that differ from it by one pixel, and wholly."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.array(Image.open(FILES.sample).convert("RGB"))
    other = pixels.copy()
    other[100, 100] ^= 64
    pictures = [pixels, other, np.random.default_rng(1).integers(0, 256, pixels.shape, dtype=np.uint8)]
    paths = [folder / f"{i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return [path.as_uri() for path in paths]


def test_ten_questions_about_a_picture_are_one_encode(stock: Stock, urls: list[str]) -> None:
    for question in [*QUESTIONS, "How many objects are there?"]:
        stock.ask(urls[0], question, qap.PruneConfig(n_keep=18))
    assert stock.state["n_encoded"] == 1
    assert stock.state["n_recalled"] == 9
    assert stock.state["n_images"] == 1


def test_recalled_pictures_answer_as_encoded_ones(stock: Stock, urls: list[str]) -> None:
    """Every way to prune, after any other, with the same probabilities to the last digit that is printed."""
    qap.set_image_cache(0)
    expected = [[stock.ask(url, QUESTIONS[0], cfg) for cfg in CONFIGS] for url in urls]
    assert stock.state == {"bytes": 0, "n_images": 0, "n_encoded": 0, "n_recalled": 0}
    qap.set_image_cache(None)
    for order in (range(len(CONFIGS)), reversed(range(len(CONFIGS)))):
        for i in order:
            for url, answers in zip(urls, expected, strict=True):
                assert stock.ask(url, QUESTIONS[0], CONFIGS[i]) == answers[i], (url, CONFIGS[i])
    # once for the rows, once more for a signal that was not noted, and then for all of them
    assert stock.state["n_encoded"] <= 3 * len(urls)
    assert stock.state["n_encoded"] + stock.state["n_recalled"] == 2 * len(CONFIGS) * len(urls)
    before = stock.state["n_encoded"]
    for cfg in CONFIGS:
        assert stock.ask(urls[0], QUESTIONS[0], cfg)
    assert stock.state["n_encoded"] == before


def test_rows_after_an_early_drop_serve_no_other_setting(stock: Stock, urls: list[str]) -> None:
    """Each early drop is an encode of its own; what happens at the end of the encoder is not."""
    half = qap.PruneConfig(n_keep=18, encoder_keep=0.5)
    drops = [
        None, half, half.replace(encoder_keep=0.4), half.replace(encoder_layer=2), half.replace(alpha=0.3),
        half.replace(error="int3"), half.replace(outlier="crest"), half.replace(outlier_weight=0.1),
        half.replace(group_size=64), half.replace(semantic="attention"), half.replace(alpha="dynamic"),
    ]  # fmt: skip
    later: list[dict[str, Any]] = [
        {},
        {"n_keep": 30},
        {"select": "topk"},
        {"merge": "average"},
        {"select": "random", "seed": 5},
    ]
    cases = [drop and drop.replace(**change) for drop in drops for change in (later if drop is half else later[:1])]
    qap.set_image_cache(0)
    expected = [stock.ask(urls[0], QUESTIONS[0], cfg) for cfg in cases]
    qap.set_image_cache(None)
    for _ in range(2):
        for cfg, answer in zip(cases, expected, strict=True):
            assert stock.ask(urls[0], QUESTIONS[0], cfg) == answer, cfg
    assert stock.state["n_encoded"] == stock.state["n_images"] == len(drops)
    assert stock.state["n_recalled"] == 2 * len(cases) - len(drops)


def test_a_signal_that_is_not_there_is_the_same_error(stock: Stock, urls: list[str]) -> None:
    cfg = qap.PruneConfig(n_keep=18, semantic="none", alpha=1.0, select="topk")
    for _ in range(2):
        with pytest.raises(Exception, match=r"Failed to|failed to|alpha"):
            stock.ask(urls[0], QUESTIONS[0], cfg)
    assert stock.ask(urls[0], QUESTIONS[0], CONFIGS[1]) == stock.ask(urls[0], QUESTIONS[0], CONFIGS[1])


def test_the_cache_is_bounded_and_the_latest_stay(stock: Stock, urls: list[str]) -> None:
    stock.ask(urls[0], QUESTIONS[0])
    one = stock.state["bytes"]
    assert 144 * 256 * 4 < one < 1 << 20
    qap.set_image_cache(1)  # a megabyte
    fits = (1 << 20) // one
    for _ in range(2):
        for url in urls:
            stock.ask(url, QUESTIONS[0])
            assert stock.state["bytes"] <= 1 << 20
    assert stock.state["n_images"] == min(fits, len(urls))


@pytest.mark.parametrize("wrong", [-1, 1.5, "1", True])
def test_a_wrong_limit_is_refused(wrong: Any) -> None:
    with pytest.raises(qap.ConfigError, match="megabytes: expected a whole number"):
        qap.set_image_cache(wrong)
