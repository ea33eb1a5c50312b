"""What only some families have: pictures in one batch (Gemma 3), fewer positions than cells (Qwen2-VL), sizes."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

import qap_gguf as qap
from conftest import Converted
from qap_gguf import _core
from qap_gguf.convert import ConvertResult
from qap_gguf.errors import ConfigError
from qap_gguf.eval.smaller import SmallerPictures
from qap_gguf.language.llama import LanguageModel
from qap_gguf.language.opener import batch_rows

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from dropin.gguf_copy import rewrite

pytestmark = [pytest.mark.parity, pytest.mark.slow]

Make = Callable[[str], ConvertResult]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, converted: Converted) -> Make:
    """The files of a family."""

    @functools.cache
    def make(name: str) -> ConvertResult:
        found: ConvertResult = converted(name)[2]
        if name == "smolvlm":  # as many tiles as the published ones have
            keys = {"clip.vision.preproc_image_size": 256}
            other = tmp_path_factory.mktemp(name) / "mmproj.gguf"
            found = dataclasses.replace(found, mmproj=rewrite(found.mmproj, other, keys))
        return found

    return make


def noise(width: int, height: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


# --- pictures that stand in one batch ---


def logits(vlm: qap.VisionModel, **settings: Any) -> Any:
    vlm.generate([noise(64, 64), "a"], prune=None, max_tokens=1, stream=True, **settings)
    return vlm.last_logits()


def test_batches_are_raised_to_a_picture_that_stands_in_one(made: Make) -> None:
    files = made("gemma-3")
    rows = batch_rows(files.mmproj)
    assert rows > 8
    found = []
    for n_batch in (512, rows, 8, 1):
        with qap.VisionModel(files.mmproj, files.model, n_threads=1, n_ctx=256, n_batch=n_batch) as vlm:
            assert vlm.encode(noise(640, 480)).n_rows == rows
            assert vlm.language_model.n_batch == min(256, max(n_batch, rows))
            found.append(logits(vlm))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-5)
    assert batch_rows(made("qwen2-vl").mmproj) == 0


@pytest.mark.parametrize("settings", [{"n_ubatch": 8}, {"n_batch": 8}, {"n_batch": 8, "n_ubatch": 512}])
def test_a_llama_whose_batch_is_too_small_is_refused_before_the_encode(made: Make, settings: dict[str, Any]) -> None:
    files = made("gemma-3")
    rows = batch_rows(files.mmproj)
    llama = llama_cpp.Llama(str(files.model), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **settings)
    line = rf"^n_batch, n_ubatch: expected at least {rows}, the rows of a picture, .*, got 8; load the Llama with more$"
    with qap.VisionModel(files.mmproj, llama, n_threads=1) as vlm:
        for _ in range(2):
            with pytest.raises(ConfigError, match=line):
                vlm.generate([noise(64, 64), "a"], prune=None)
        image = vlm.encode(noise(64, 64))
        with pytest.raises(ConfigError, match=line):
            vlm.generate([image, "a"], prune=None)
        assert vlm.generate([image, "a"], prune=qap.PruneConfig(n_keep=8), max_tokens=2) is not None
    with qap.ChatHandler(files.mmproj) as handler, pytest.raises(ConfigError, match=line):
        handler(llama=llama, messages=user(noise(64, 64), "a"), prune=None)
    assert handler.n_encodes == 0
    llama.close()


STOCK = """
import sys, io, base64, llama_cpp, qap_gguf
from llama_cpp.llama_chat_format import Llava15ChatHandler
from PIL import Image
model, mmproj, settings = sys.argv[1], sys.argv[2], eval(sys.argv[3])
handler = Llava15ChatHandler(clip_model_path=mmproj, verbose=False)
llama = llama_cpp.Llama(model, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True, **settings)
file = io.BytesIO()
Image.effect_noise((64, 64), 50).convert("RGB").save(file, "PNG")
uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "a"}]
try:
    settings = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    answer = handler(llama=llama, messages=[{"role": "user", "content": parts}], **settings)
    print(answer["choices"][0]["logprobs"]["content"][0]["logprob"])
except ValueError as err:
    print("refused:", err)
"""


def test_stock_handlers_are_refused_or_given_one_batch(made: Make) -> None:
    files = made("gemma-3")

    def answer(settings: dict[str, int]) -> str:
        words = [sys.executable, "-c", STOCK, str(files.model), str(files.mmproj), repr(settings)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (done.returncode, done.stderr)
        return done.stdout.strip()

    usual = float(answer({}))
    assert answer({"n_ubatch": 8}).startswith("refused: ")
    assert answer({"n_batch": 8}).startswith("refused: ")
    assert float(answer({"n_batch": 64})) == pytest.approx(usual, rel=1e-4)


# --- fewer positions than cells ---


def test_an_answer_about_a_qwen_picture_ends_where_the_context_does(made: Make) -> None:
    files = made("qwen2-vl")
    picture = noise(256, 256)
    with qap.VisionModel(files.mmproj, files.model, n_threads=1, n_ctx=320) as vlm:
        assert vlm.encode(picture).n_tokens == 256
        settings: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        for prune in (None, qap.PruneConfig(n_keep=200), qap.PruneConfig(n_keep=2)):
            gen = vlm.generate([picture, "a"], prune=prune, max_tokens=5000, stream=True, **settings)
            "".join(gen)
            assert gen.stats.n_kv <= 320
            assert gen.stats.finish_reason == "stop" or vlm.answers.room <= 1
        with qap.ChatHandler(files.mmproj) as handler:
            ended = set()
            for seed in range(4):
                for most in (None, 5000):
                    completion = handler(
                        llama=vlm.language_model, messages=user(picture, "a"), max_tokens=most, seed=seed, **settings
                    )
                    ended.add(completion["choices"][0]["finish_reason"])
            assert "length" in ended
            assert ended <= {"length", "stop"}


# --- the most tokens of a picture ---

LIMITED = {"qwen2-vl": 1024, "smolvlm": 512, "internvl": 1024, "pixtral": 1024, "llava-next": 1024}  # a long side


@pytest.mark.parametrize("name", list(LIMITED))
def test_a_limit_on_the_tokens_of_a_picture(made: Make, name: str) -> None:
    files, side = made(name), LIMITED[name]
    llama = llama_cpp.Llama(str(files.model), n_ctx=64, n_threads=1, verbose=False)
    with qap.VisionModel(files.mmproj, llama, n_threads=1) as vlm:
        sizes = [(side, side), (side, side // 2), (side // 4, side), (64, 64)]
        free = [vlm._encoder.count(size).n_tokens for size in sizes]
    limit = max(free) * 2 // 3
    with qap.VisionModel(files.mmproj, llama, n_threads=1, max_image_tokens=limit) as vlm:
        held = [vlm._encoder.count(size).n_tokens for size in sizes]
        assert 0 < max(held) <= limit < max(free)
        image = vlm.encode(noise(256, 192))
        assert image.n_tokens <= limit
        assert image.n_tokens == vlm._encoder.count((256, 192)).n_tokens
    llama.close()


def test_the_environment_holds_programs_that_set_no_limit(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as stock handlers: their way into libmtmd is the encoder's without a limit of its own."""
    files = made("qwen2-vl")
    llama = llama_cpp.Llama(str(files.model), n_ctx=64, n_threads=1, verbose=False)
    address = LanguageModel(llama).model_address

    def most(text: str) -> int:
        monkeypatch.setenv("QAP_MAX_IMAGE_TOKENS", text)
        encoder = _core.Encoder(
            mmproj=str(files.mmproj), model=address, device="CPU", n_threads=1, flash_attn=None, max_tokens=None,
            verbose=False,
        )  # fmt: skip
        chunks = encoder.tokenize(_core.media_marker(), [(1024, 1024)], False, True)
        return sum(chunk.n_tokens for chunk in chunks if chunk.is_image)

    assert most("") == 4096
    assert 40 <= most("50") <= 50
    assert most("5") <= 5  # below the family's own least
    for wrong in ("x", "0", "65537", "7 "):
        with pytest.raises(RuntimeError, match=rf"expected a number in 1\.\.65536, got '{wrong}'; unset it"):
            most(wrong)
    llama.close()


# --- a smaller picture, the baseline of an evaluation ---


@pytest.mark.parametrize("name", list(LIMITED))
def test_a_smaller_picture_has_the_tokens_that_it_may_have(made: Make, name: str) -> None:
    files, side = made(name), LIMITED[name] // 2
    llama = llama_cpp.Llama(str(files.model), n_ctx=64, n_threads=1, verbose=False)
    picture = noise(side, side * 3 // 4)
    with qap.VisionModel(files.mmproj, llama, n_threads=1) as vlm, SmallerPictures(vlm) as smaller:
        whole = vlm._encoder.count((side, side * 3 // 4)).n_tokens
        found = [smaller.encode(picture, n_keep).n_tokens for n_keep in (whole, whole * 2 // 3)]
        assert found[0] == whole
        assert 0 < found[1] <= whole * 2 // 3
        if name in ("qwen2-vl", "pixtral"):
            assert found[1] > whole * 2 // 3 * 0.7  # tokens go by lines, so not by any number
    llama.close()


# --- tiles with the same pixels ---


class _Counting:
    """The native encoder, counting its encodes."""

    def __init__(self, native: Any) -> None:
        self.native, self.n_encodes = native, 0

    def encode(self, *words: Any) -> Any:
        self.n_encodes += 1
        return self.native.encode(*words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)


@pytest.mark.parametrize("name", ["smolvlm", "internvl"])
def test_blank_tiles_are_encoded_once(made: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files, side = made(name), LIMITED[name]
    llama = llama_cpp.Llama(str(files.model), n_ctx=64, n_threads=1, verbose=False)
    picture = np.full((side, side, 3), 255, np.uint8)
    picture[: side // 8, : side // 8] = noise(side // 8, side // 8)
    with qap.VisionModel(files.mmproj, llama, n_threads=1) as vlm:
        encoder = vlm._encoder
        counting = _Counting(encoder._native)
        monkeypatch.setattr(encoder, "_native", counting)
        once = encoder.encode(picture, hidden=False)
        assert counting.n_encodes == 3 < len(once.pieces)  # what is not blank, the overview, one blank tile
        chunks = encoder.tokenize(_core.media_marker(), [picture], add_special=False)
        tiles = [chunk for chunk in chunks if chunk.is_image]
        each = np.concatenate([counting.native.encode(tile, True, False, None) for tile in tiles])
        np.testing.assert_array_equal(once.features, each)
        assert once.attention is None or len(once.attention) == once.n_tokens
        counting.n_encodes = 0
        encoder.encode(noise(side, side), hidden=False)
        assert counting.n_encodes == len(once.pieces)
    llama.close()
