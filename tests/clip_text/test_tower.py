"""Token ids, the prompt's embedding, projected patches and relevance: equal to transformers' on the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from clip_text.clip_checkpoint import hidden_states, nmse
from qap_gguf.errors import ArrayError, ConfigError, NativeError
from qap_gguf.pruning.clip_text import ClipTextTower

if TYPE_CHECKING:
    from clip_text.conftest import Clip

Array = npt.NDArray[Any]
LIMIT = 1e-5
PROMPTS = [
    "a photo of a cat",
    "x <|endoftext|> y",
    "What color is the background?",
    "Где кот?",
    "don't!",
    "",
    "word " * 600,
]


def text_embedding(clip: Clip, text: str) -> Array:
    import torch

    with torch.no_grad():
        states = clip.hf.text_model(input_ids=torch.tensor([clip.ids(text)])).pooler_output
        out: Array = clip.hf.text_projection(states)[0].numpy()
    return out


def patch_embeddings(clip: Clip, hidden: Array) -> Array:
    import torch

    with torch.no_grad():
        normed = clip.hf.vision_model.post_layernorm(torch.tensor(hidden))
        out: Array = clip.hf.visual_projection(normed).numpy()
    return out


def test_token_ids_equal_transformers(clip: Clip, clip_texts: list[str]) -> None:
    assert len(clip_texts) >= 200
    for text in clip_texts:
        assert clip.tower.tokenize(text) == clip.ids(text), repr(text)


def test_every_letter_is_cut_and_lowered_as_transformers_does(clip: Clip) -> None:
    import unicodedata

    if clip.case.n_ctx < 500:
        pytest.skip("the other CLIP, with room for many letters, shows it")
    # Private use, surrogates, and what Unicode 14 does not know are left out; CJK and Hangul are sampled.
    codes = [c for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    codes = [c for c in codes if not (0x3400 <= c <= 0xD7FF or 0x17000 <= c <= 0x18CFF) or c % 97 == 0]
    lines = ["a" + "1".join(chr(c) + "q" + chr(c) for c in codes[i : i + 12]) for i in range(0, len(codes), 12)]
    want = clip.tokenizer(lines, truncation=True, max_length=clip.case.n_ctx).input_ids
    wrong = [line for line, ids in zip(lines, want, strict=True) if clip.tower.tokenize(line) != ids]
    assert not wrong


def test_marks_in_any_order_compose_as_in_transformers(clip: Clip) -> None:
    import random
    import unicodedata

    # Only what Unicode 3.2 knew: later marks depend on the version of the tokenizers package.
    old = [c for c in map(chr, range(0x3100)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Co", "Cs")]
    marks = [c for c in old if unicodedata.combining(c)]
    hangul = [chr(c) for c in (0x1100, 0x1112, 0x1161, 0x1175, 0x11A8, 0x11C2, 0xAC00, 0xD788)]
    chosen = random.Random(3)
    for _ in range(2000):
        text = "".join(
            chosen.choice(chosen.choice([marks, marks, old, hangul, ["e", "O", "<", "'"]]))
            for _ in range(chosen.randint(2, 12))
        )
        assert clip.tower.tokenize(text) == clip.ids(text), ascii(text)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embedding_of_the_prompt(clip: Clip, prompt: str) -> None:
    got, want = clip.tower.embed(prompt), text_embedding(clip, prompt)
    cosine = float(got @ want / np.linalg.norm(got) / np.linalg.norm(want))
    print(f"cosine {cosine:.8f}, NMSE {nmse(got, want):.1e}")
    assert got.shape == (clip.case.n_proj,)
    assert cosine >= 0.9999
    assert nmse(got, want) <= LIMIT


def test_prompts_differ(clip: Clip) -> None:
    one, other = (clip.tower.embed(text) for text in PROMPTS[:2])
    assert nmse(one, other) > 1000 * LIMIT


def test_a_long_prompt_is_cut_and_keeps_its_end(clip: Clip) -> None:
    ids = clip.tower.tokenize("word " * 3000)
    assert len(ids) == clip.tower.n_ctx == clip.case.n_ctx
    assert ids == clip.ids("word " * 3000)
    assert ids[-1] == clip.tower.tokenize("")[-1]
    assert clip.tower.tokenize("x " * 100_000) == clip.ids("x " * 5000)


def test_one_enormous_word_takes_no_quadratic_time(clip: Clip) -> None:
    assert clip.tower.tokenize("a" * 500_000)[:5] == clip.ids("a" * 5000)[:5]


@pytest.mark.parametrize("n_tok", [1, 50, 577])
def test_projected_patches(clip: Clip, n_tok: int) -> None:
    hidden = hidden_states(n_tok)
    got, want = clip.tower.project(hidden), patch_embeddings(clip, hidden)
    assert got.shape == (n_tok, clip.case.n_proj)
    assert nmse(got, want) <= LIMIT


@pytest.mark.parametrize("prompt", PROMPTS)
def test_relevance_is_minus_the_cosine(clip: Clip, prompt: str) -> None:
    hidden = hidden_states()
    patches, words = patch_embeddings(clip, hidden), text_embedding(clip, prompt)
    want = -(patches @ words) / np.linalg.norm(patches, axis=1) / np.linalg.norm(words)
    got = clip.tower.relevance(hidden, prompt)
    print(f"NMSE {nmse(got, want):.1e}")
    assert got.dtype == np.float32
    assert got.shape == (50,)
    assert nmse(got, want) <= LIMIT
    assert nmse(got, -want) > 1


def test_constant_patches_give_finite_relevance(clip: Clip) -> None:
    hidden = np.zeros((3, 32), "f4")
    hidden[1], hidden[2] = 5.0, 1e-30
    assert np.isfinite(clip.tower.relevance(hidden, "cat")).all()


def test_wrong_arguments_are_one_line(clip: Clip) -> None:
    good = hidden_states(4)
    bad: list[tuple[Any, Any, type[Exception], str]] = [
        (good[:, :31].copy(), "x", ArrayError, r"expected \(n_tok, 32\)"),
        (good.astype("f8"), "x", ArrayError, "float32"),
        (good[:, ::2], "x", ArrayError, "C order"),
        (good[0], "x", ArrayError, "shape"),
        (np.where(good > 1, np.nan, good).astype("f4"), "x", ArrayError, "finite"),
        (np.full((2, 32), np.inf, "f4"), "x", ArrayError, "finite"),
        (good, b"x", ConfigError, "str"),
        (good, "\ud800", ConfigError, "surrogate"),
        (good, "x" * (2 << 20), ConfigError, "bytes"),
    ]
    for hidden, prompt, kind, words in bad:
        with pytest.raises(kind, match=words) as caught:
            clip.tower.relevance(hidden, prompt)
        assert "\n" not in str(caught.value)


def test_a_closed_tower_says_so(clip: Clip) -> None:
    tower = ClipTextTower.open(clip.mmproj)
    assert tower is not None
    tower.close()
    tower.close()
    with pytest.raises(NativeError, match="closed"):
        tower.embed("x")


def test_threads_share_a_tower(clip: Clip) -> None:
    from concurrent.futures import ThreadPoolExecutor

    hidden, prompts = hidden_states(), PROMPTS * 4
    want = [clip.tower.relevance(hidden, prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda prompt: clip.tower.relevance(hidden, prompt), prompts))
    np.testing.assert_array_equal(got, want)
