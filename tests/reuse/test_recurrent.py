"""Language models with recurrent layers: with the KV prefix reused, answers are those of a start from nothing.

They are compared bit for bit. Of such a state no token can be taken back, so it is copied where a prompt may go on from
(generation/prefill.py). The models are random: Qwen3.5 (gated delta nets, M-RoPE) and LFM2 (short convolutions, one
position a token).
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import pytest

import qap_gguf as qap
from conftest import Converted
from qap_gguf import _core
from qap_gguf.language.likelihood import likelihoods

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from families.checkpoints import FAMILIES

pytestmark = [pytest.mark.parity, pytest.mark.slow]

N_CTX = 512
QUESTIONS = ("What is this?", "Where is the cat? In two words.", "how many")
CONFIGS = (
    None,
    qap.PruneConfig(n_keep=5),
    qap.PruneConfig(n_keep=9, positions="compact", select="topk"),
    qap.PruneConfig(n_keep=5, alpha=0.0),
)
Asked = tuple[tuple[int, ...], str, qap.PruneConfig | None]


@dataclass
class Pair:
    """One model twice: `reusing` takes over what it can, `starting` is told to forget before each question."""

    reusing: qap.VisionModel
    starting: qap.VisionModel
    pictures: list[Any]


@pytest.fixture(scope="module", params=["qwen3.5", "lfm2-vl"])
def pair(request: pytest.FixtureRequest, converted: Converted) -> Iterator[Pair]:
    _, _, files = converted(request.param)
    width, height = FAMILIES[request.param].image
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(2)]
    pictures.append(rng.integers(0, 256, (width, height, 3), dtype=np.uint8))
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(qap.VisionModel(files.mmproj, files.model, n_ctx=N_CTX, n_threads=1)) for _ in range(2)
        ]
        assert both[0]._language.is_recurrent
        yield Pair(both[0], both[1], pictures)


def run(vlm: qap.VisionModel, pictures: list[Any], what: Asked) -> tuple[bytes, list[int], int]:
    """Logits of the first token, the first tokens of the answer, and how many cells were taken over."""
    numbers, question, cfg = what
    images = [vlm.encode(pictures[number]) for number in numbers]
    cut = [(image, None if cfg is None else vlm.prune(image, cfg)) for image in images]
    stats = qap.GenerationStats()
    prompt = "user: " + "".join(_core.media_marker() + "\n" for _ in images) + question
    vlm.answers.place(prompt, cut, stats, add_special=True)
    logits = np.asarray(vlm.last_logits()).tobytes()
    with contextlib.closing(vlm._language.tokens(temperature=0, top_k=1, top_p=1, min_p=0, seed=1)) as tokens:
        answer = list(itertools.islice(tokens, 3))
    return logits, answer, stats.n_reused


def fresh(pair: Pair, what: Asked) -> tuple[bytes, list[int]]:
    pair.starting._language.reset()
    return run(pair.starting, pair.pictures, what)[:2]


def some_question(rng: random.Random, before: Asked) -> Asked:
    """Something like the question before it, so that there is something to take over; at times another one."""
    numbers, _, cfg = before
    kind = rng.randrange(4)
    if kind == 0:
        numbers = tuple(rng.choices(range(3), k=rng.randrange(3)))
    elif kind == 1:
        cfg = rng.choice(CONFIGS)
    elif kind == 2:
        numbers = (*numbers, rng.randrange(3))[-2:]
    return numbers, rng.choice(QUESTIONS), cfg


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence(pair: Pair, seed: int) -> None:
    rng, reused = random.Random(seed), 0
    what: Asked = ((0,), QUESTIONS[0], None)
    for _ in range(10):
        what = some_question(rng, what)
        logits, answer, n_reused = run(pair.reusing, pair.pictures, what)
        assert (logits, answer) == fresh(pair, what), (what, n_reused)
        reused += n_reused
    assert reused > 0


def test_what_is_reused(pair: Pair) -> None:
    """Up to the last image, where the state was copied; nothing where the beginning is another one."""
    pair.reusing._language.reset()
    cfg = qap.PruneConfig(n_keep=5)
    assert run(pair.reusing, pair.pictures, ((0,), QUESTIONS[0], cfg))[2] == 0
    front = len(pair.reusing._language.record.steps[0].ids)
    steps: list[tuple[Asked, int]] = [
        (((0,), QUESTIONS[0], cfg), front + 5),
        (((0,), QUESTIONS[1], cfg), front + 5),
        (((1,), QUESTIONS[1], cfg), 0),
        (((1,), QUESTIONS[1], None), 0),
        (((1, 0), QUESTIONS[1], cfg), 0),
        (((1,), QUESTIONS[2], cfg), 0),  # the state stands after two pictures
        (((), QUESTIONS[2], None), 0),
        (((), QUESTIONS[2], None), 0),  # one step: it is evaluated for its logits
    ]
    assert [run(pair.reusing, pair.pictures, what)[2] for what, _ in steps] == [n for _, n in steps]


def test_others_use_the_same_llama(pair: Pair) -> None:
    """Text between two of our answers, and a cache that was emptied behind our back."""
    what: Asked = ((0,), QUESTIONS[1], CONFIGS[1])
    expected, llama = fresh(pair, what), pair.reusing.language_model
    run(pair.reusing, pair.pictures, what)
    assert run(pair.reusing, pair.pictures, what)[2] > 0
    llama.create_completion(list(range(5, 90)), max_tokens=1)
    assert run(pair.reusing, pair.pictures, what) == (*expected, 0)
    llama._ctx.kv_cache_clear()  # type: ignore[no-untyped-call]
    assert run(pair.reusing, pair.pictures, what) == (*expected, 0)


def test_choices_are_scored_from_the_same_state(pair: Pair) -> None:
    """A choice of several tokens changes the state; the next one must not see it."""
    texts = ["Hello world, the cat", "a", "What is at 3.14?", "Hello world, the cat"]
    expected = []
    for text in texts:
        pair.starting._language.reset()
        prompt(pair.starting, pair.pictures[0])
        expected += likelihoods(pair.starting.language_model, [text])
    pair.starting._language.reset()
    prompt(pair.starting, pair.pictures[0])
    assert likelihoods(pair.starting.language_model, texts) == expected
    assert expected[0] == expected[3] != expected[2]


def prompt(vlm: qap.VisionModel, picture: Any) -> None:
    vlm.answers.place(
        f"user: {_core.media_marker()}\nassistant:", [(vlm.encode(picture), None)], qap.GenerationStats(),
        add_special=True,
    )  # fmt: skip


def test_a_state_that_cannot_be_written_is_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    what: Asked = ((0,), QUESTIONS[0], None)
    expected = fresh(pair, what)
    pair.reusing._language.reset()
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_state_seq_get_data_ext", lambda *_: 0)
        with pytest.raises(qap.NativeError, match="bytes of the language model's state"):
            run(pair.reusing, pair.pictures, what)
    assert run(pair.reusing, pair.pictures, what) == (*expected, 0)
