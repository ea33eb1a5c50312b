"""Gemma 3's prompts: exactly the ids of transformers' processor, wherever pictures stand, whatever stands beside them.

The processor writes a blank line before and after a picture, and Gemma's tokenizer has one token for each run of line
breaks, so the blank line and the breaks beside it become one token.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import qap_gguf as qap
from conftest import Converted
from qap_gguf import _core
from qap_gguf.errors import ConfigError

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytest.importorskip("sentencepiece")

from families.checkpoints import ID  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

BREAKS = ["\n" * n for n in range(4)]
MARK = "@"  # the picture's place in these texts
PROMPTS = [
    *(f"a{before}@{after}b" for before, after in itertools.product(BREAKS, BREAKS)),
    *(f"{before}@{after}b" for before, after in itertools.product(BREAKS, BREAKS)),  # a picture first
    *(f"a{before}@{after}" for before, after in itertools.product(BREAKS, BREAKS)),  # a picture last
    *(f"a @{between}@ b" for between in (*BREAKS, " ", " \n", "\n b \n", "b")),
    *("@", "@@", "@@@", "\n@\n@\n@\n", " @ ", "one: @ two: @\n\nwhich?", "no picture\n\n\nat all", "\n\n\n\n\n\n@"),
    "<start_of_turn>user\n@What is this?<end_of_turn>\n<start_of_turn>model\n",  # the published template
    "user\n@@What?\n\n\nmodel\n",
]


@pytest.fixture(scope="module")
def family(converted: Converted) -> Iterator[tuple[qap.VisionModel, Path]]:
    _, source, files = converted("gemma-3")
    llama = llama_cpp.Llama(str(files.model), n_ctx=512, verbose=False, n_threads=1)
    with qap.VisionModel(files.mmproj, llama, n_threads=1) as vlm:
        yield vlm, source
    llama.close()


@pytest.fixture(scope="module")
def processor(family: tuple[qap.VisionModel, Path]) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(family[1])
    pictures = transformers.Gemma3ImageProcessorPil(size={"height": 64, "width": 64})
    return transformers.Gemma3Processor(pictures, tokenizer, image_seq_length=16)


def ids_of(vlm: qap.VisionModel, prompt: str, *, add_special: bool = True) -> list[int]:
    sizes = [(64, 64)] * prompt.count(MARK)
    chunks = vlm._encoder.tokenize(prompt.replace(MARK, _core.media_marker()), sizes, add_special=add_special)
    found: list[int] = []
    for chunk in chunks:
        found += [ID["<image_soft_token>"]] * chunk.n_tokens if chunk.is_image else chunk.tokens
    return found


def test_ids_equal_the_processors(family: tuple[qap.VisionModel, Path], processor: Any) -> None:
    vlm, _ = family
    black = np.zeros((64, 64, 3), np.uint8)
    assert len(set(PROMPTS)) == len(PROMPTS)
    for prompt in PROMPTS:
        text = "<s>" + prompt.replace(MARK, "<start_of_image>")
        want = processor(text=text, images=[black] * prompt.count(MARK) or None).input_ids
        assert ids_of(vlm, prompt) == want[0], prompt


def test_runs_of_line_breaks_are_tokens_of_their_own(family: tuple[qap.VisionModel, Path]) -> None:
    """Or the test above would not see whether they are joined."""
    vlm, _ = family
    runs = [vlm.language_model.tokenize(("\n" * n).encode(), add_bos=False) for n in range(1, 7)]
    assert [len(run) for run in runs] == [1] * 6
    joined = ids_of(vlm, "a\n@\n\nb", add_special=False)
    assert runs[2][0] in joined
    assert runs[3][0] in joined


def test_stock_writes_no_blank_lines(family: tuple[qap.VisionModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, _ = family
    words = vlm.language_model
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    picture = [ID["<start_of_image>"], *[ID["<image_soft_token>"]] * 16, ID["<end_of_image>"]]
    for before, after in itertools.product(BREAKS, BREAKS):
        want = [words.tokenize(text.encode(), add_bos=False) for text in (f"a{before}", f"{after}b")]
        assert ids_of(vlm, f"a{before}@{after}b", add_special=False) == [*want[0], *picture, *want[1]]
    assert ids_of(vlm, "@@", add_special=False) == picture * 2


def test_room_cache_and_reuse_count_these_tokens(family: tuple[qap.VisionModel, Path]) -> None:
    vlm, _ = family
    picture = vlm.encode(np.zeros((64, 64, 3), np.uint8))
    fits = 512 - 1  # one is left for the answer
    n_text = fits - len(ids_of(vlm, "a\n@\nb"))
    for more in (0, 1):
        prompt = f"a\n{_core.media_marker()}\nb" + "\x01" * (n_text + more)  # a byte that is a token
        assert len(ids_of(vlm, prompt.replace(_core.media_marker(), MARK))) == fits + more
        refusal = pytest.raises(ConfigError, match=r"at most 512 tokens \(n_ctx\), got 513")
        with refusal if more else contextlib.nullcontext():
            vlm.answers.check_fit(prompt, [picture.size], [None], None, add_special=True)
    prompt, n_tokens = f"a\n{_core.media_marker()}\nb", len(ids_of(vlm, "a\n@\nb"))
    for n_reused in (0, n_tokens - 3):  # the text after the picture runs again: its end, three line breaks, b
        stats = qap.GenerationStats()
        vlm.answers.place(prompt, [(picture, None)], stats, add_special=True)
        assert (stats.n_kv, stats.n_reused) == (n_tokens, n_reused)
