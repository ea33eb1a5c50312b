"""Settings at run time: none of them ends the process, and seed 0 is a seed like others. The packaged model."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import llama_cpp

import qap_gguf as qap
from qap_gguf.errors import ArrayError, ConfigError, ImageError, NativeError
from qap_gguf.language.opener import open_llama
from qap_gguf.vision.store import pack

QUESTION = "How many objects are there?"
FILES = qap.packaged_model()
RANDOM: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 8}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def content(completion: Any) -> str:
    return str(completion["choices"][0]["message"]["content"])


# --- seeds: every door ---


def varied(ask: Any, *seeds: int) -> dict[int, set[tuple[str, ...]]]:
    """For each seed the different answers to three questions, asked three times."""
    return {seed: {tuple(ask(seed)) for _ in range(3)} for seed in seeds}


def check_seeds(found: dict[int, set[tuple[str, ...]]]) -> None:
    assert all(len(answers) == 1 for answers in found.values()), found
    assert len(set.union(*found.values())) > 1, found


def test_seeds_of_a_vision_model() -> None:
    def ask(seed: int) -> list[str]:
        with qap.VisionModel(n_threads=1, n_ctx=256, seed=seed) as vlm:
            image = vlm.encode(FILES.sample)
            return [vlm.generate([image, q], **RANDOM) for q in "abc"]

    check_seeds(varied(ask, 0, 1, 2))


@pytest.fixture(scope="module")
def llama() -> Any:
    llama = open_llama(FILES.model, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    yield llama
    llama.close()


def test_seeds_of_a_vision_model_around_a_llama(llama: llama_cpp.Llama) -> None:
    llama.set_seed(7)

    def ask(seed: int) -> list[str]:
        with qap.VisionModel(FILES.mmproj, llama, n_threads=1, seed=seed) as vlm:
            image = vlm.encode(FILES.sample)
            return [vlm.generate([image, q], **RANDOM) for q in "abc"]

    check_seeds(varied(ask, 0, 1, 2))
    assert llama._seed == 7


def test_seeds_of_the_handler(llama: llama_cpp.Llama) -> None:
    with qap.ChatHandler(FILES.mmproj) as handler:

        def ask(seed: int) -> list[str]:
            return [content(handler(llama=llama, messages=user(FILES.sample, q), seed=seed, **RANDOM)) for q in "abc"]

        check_seeds(varied(ask, 0, 1, 2))


def test_a_llama_keeps_seed_zero(llama: llama_cpp.Llama) -> None:
    llama.set_seed(0)
    assert open_seed(0) == 0
    assert open_seed(5) == 5


def open_seed(seed: int) -> int:
    llama = open_llama(FILES.model, n_ctx=64, n_threads=1, verbose=False, seed=seed)
    try:
        return int(llama._seed)
    finally:
        llama.close()


# --- the context is full ---


def test_an_answer_ends_where_the_context_does() -> None:
    with qap.VisionModel(n_threads=1, n_ctx=192) as vlm:
        image = vlm.encode(FILES.sample)
        words = "tell me all " * 2
        gen = vlm.generate(
            [image, words], prune=None, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=500, stream=True
        )
        "".join(gen)
        assert gen.stats.n_kv <= 192
        assert gen.stats.finish_reason in ("length", "stop")
        short = vlm.generate([image, QUESTION], prune=None, max_tokens=1, stream=True)
        "".join(short)
        assert (short.stats.finish_reason, short.stats.n_generated) == ("length", 1)
        whole = vlm.generate([image, QUESTION], prune=None, stream=True)
        assert ("".join(whole), whole.stats.finish_reason) == ("four", "stop")
        stopped = vlm.generate([image, QUESTION], prune=None, stop=["ou"], stream=True)
        assert ("".join(stopped), stopped.stats.finish_reason) == ("f", "stop")


def test_a_picture_that_cannot_fit_is_not_encoded() -> None:
    with qap.VisionModel(n_threads=1, n_ctx=96) as vlm:
        with pytest.raises(ConfigError, match=r"^prompt: expected at most 96 tokens \(n_ctx\), got \d+; "):
            vlm.generate([FILES.sample, QUESTION], prune=None)
        with pytest.raises(ConfigError, match="n_ctx"):
            vlm.generate([FILES.sample, QUESTION], prune=qap.PruneConfig(n_keep=90))
        with qap.ChatHandler(FILES.mmproj) as handler:
            for call in (handler, handler.encode_images):
                for prune in (None, qap.PruneConfig(n_keep=90)):
                    with pytest.raises(ConfigError, match="n_ctx"):
                        call(llama=vlm.language_model, messages=user(FILES.sample, QUESTION), prune=prune)
            assert handler.n_encodes == 0
        assert vlm.n_encodes == 0
        assert vlm.generate([FILES.sample, QUESTION], prune=qap.PruneConfig(n_keep=18), max_tokens=4)
        assert vlm.n_encodes == 1


# --- encoded once, said once ---


def test_an_encode_counts_for_one_answer() -> None:
    with qap.VisionModel(n_threads=1, n_ctx=512) as vlm:
        image = vlm.encode(FILES.sample)
        first = vlm.generate([image, QUESTION], prune=None, stream=True)
        second = vlm.generate([image, QUESTION], prune=None, stream=True)
        third = vlm.generate([FILES.sample, QUESTION], prune=None, stream=True)  # from the cache
        assert (first.stats.encode_s, first.stats.n_cached) == (image.seconds, 0)
        assert first.stats.encode_bytes > 0
        for later in (second, third):
            assert (later.stats.encode_s, later.stats.encode_bytes, later.stats.n_cached) == (0.0, 0, 1)


# --- features that are no numbers ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_features_that_are_not_finite(value: float, llama: llama_cpp.Llama) -> None:
    with qap.VisionModel(FILES.mmproj, llama, n_threads=1) as vlm:
        image = vlm.encode(FILES.sample)
        features = image.features.copy()
        features[77, 3] = value
        bad = dataclasses.replace(image, features=features)
        with pytest.raises(ArrayError, match=r"^features: expected finite numbers"):
            vlm.generate([bad, QUESTION], prune=None)
        with qap.ChatHandler(FILES.mmproj) as handler, pytest.raises(ArrayError, match=r"^features: expected finite"):
            handler(llama=llama, messages=user(bad, QUESTION))
        assert vlm.generate([image, QUESTION], prune=None) == "four"


def test_a_forged_file_of_the_cache_counts_as_missing(tmp_path: Path, llama: llama_cpp.Llama) -> None:
    with qap.VisionModel(FILES.mmproj, llama, n_threads=1, cache=qap.EmbeddingCache(folder=tmp_path)) as vlm:
        image = vlm.encode(FILES.sample)
        (stored,) = tmp_path.glob("*.qapemb")
        forged = dataclasses.replace(image, features=np.full_like(image.features, np.nan))
        stored.write_bytes(pack(stored.stem, forged))
        vlm.forget()
        assert np.array_equal(vlm.encode(FILES.sample).features, image.features)
        assert vlm.n_encodes == 2


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    from dropin.gguf_copy import rewrite

    broken = tmp_path / "nan.gguf"
    rewrite(FILES.model, broken, tensors={"output_norm.weight": np.full(256, np.nan, np.float32)})
    with qap.VisionModel(FILES.mmproj, broken, n_threads=1, n_ctx=256) as vlm:
        for prune in (None, qap.PruneConfig(n_keep=18)):
            with pytest.raises(NativeError, match=r"^expected finite logits"):
                vlm.generate([FILES.sample, QUESTION], prune=prune)
        with qap.ChatHandler(FILES.mmproj) as handler, pytest.raises(NativeError, match=r"^expected finite logits"):
            handler(llama=vlm.language_model, messages=user(FILES.sample, QUESTION))


# --- the opener ---


def test_types_of_the_kv_cache() -> None:
    with qap.VisionModel(n_threads=1, n_ctx=256, kv="q8_0") as vlm:
        assert vlm.language_model.context_params.type_k == 8
        assert vlm.generate([FILES.sample, QUESTION], prune=None) == "four"
        with pytest.raises(ConfigError, match=r"^kv: expected None for a Llama that is loaded already, got 'f16'"):
            qap.VisionModel(FILES.mmproj, vlm.language_model, kv="f16")
    with pytest.raises(ConfigError, match=r"^kv: expected one of f16, "):
        qap.VisionModel(kv="q3")


@pytest.mark.parametrize("n_batch", [1, 7, 5000])
def test_any_batch(n_batch: int) -> None:
    with qap.VisionModel(n_threads=1, n_ctx=256, n_batch=n_batch) as vlm:
        assert vlm.generate([FILES.sample, QUESTION], prune=None) == "four"


def test_a_limit_that_a_model_of_one_size_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^max_image_tokens: expected at least 144, .*, got 100; "):
        qap.VisionModel(max_image_tokens=100, n_threads=1, n_ctx=64)
    with qap.VisionModel(max_image_tokens=144, n_threads=1, n_ctx=64) as vlm:
        assert vlm.encode(FILES.sample).n_tokens == 144
    for wrong in (0, -1, True, 1.5, 10**6):
        with pytest.raises(ConfigError, match=r"^max_image_tokens: expected an integer"):
            qap.VisionModel(max_image_tokens=wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("QAP_MAX_IMAGE_TOKENS", "100")
    with pytest.raises(ConfigError, match=r"^max_image_tokens: expected at least 144"):
        qap.VisionModel(n_threads=1, n_ctx=64)
    for text in ("many", "0", "-3", "1e3"):
        monkeypatch.setenv("QAP_MAX_IMAGE_TOKENS", text)
        with pytest.raises(ConfigError, match=r"^QAP_MAX_IMAGE_TOKENS: expected an integer"):
            qap.VisionModel(n_threads=1, n_ctx=64)


# settings of a Llama that the caller opens: a child answers or refuses with one line, none may be ended by a signal
HOSTILE: list[dict[str, Any]] = [
    {"n_batch": 1}, {"n_ubatch": 1}, {"n_batch": 8, "n_ubatch": 512}, {"n_ctx": 1}, {"n_ctx": 8},
    {"n_ctx": 160, "n_batch": 512},
    {"n_ctx": 0}, {"attention_type": 1}, {"attention_type": 1, "n_ubatch": 8}, {"pooling_type": 3}, {"embedding": True},
    {"vocab_only": True}, {"logits_all": True, "n_batch": 8}, {"type_v": 8}, {"type_k": 2}, {"swa_full": True},
    {"rope_scaling_type": 2, "yarn_orig_ctx": 64, "yarn_ext_factor": 1.0}, {"rope_scaling_type": 3},
    {"rope_freq_base": -1.0},
    {"rope_freq_scale": 1e-9}, {"last_n_tokens_size": 0}, {"last_n_tokens_size": -1}, {"offload_kqv": False},
]  # fmt: skip
CHILD = """
import sys, llama_cpp, qap_gguf as qap
files = qap.packaged_model()
try:
    settings = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1, **eval(sys.argv[1])}
    llama = llama_cpp.Llama(str(files.model), **settings)
except Exception as err:
    sys.exit(f"opening: {err}")
try:
    with qap.VisionModel(files.mmproj, llama, n_threads=1) as vlm:
        print(vlm.generate([files.sample, "How many objects are there?"], prune=None, max_tokens=4))
    with qap.ChatHandler(files.mmproj, n_threads=1) as handler:
        print(handler(llama=llama, messages=[{"role": "user", "content": [files.sample, "What?"]}], max_tokens=4))
except qap.QapError as err:
    assert "\\n" not in str(err)
    print("refused:", err)
"""


@pytest.mark.slow
@pytest.mark.parametrize("settings", HOSTILE, ids=str)
def test_no_setting_of_a_llama_ends_the_process(settings: dict[str, Any]) -> None:
    words = [sys.executable, "-c", CHILD, repr(settings)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 or done.stderr.startswith("opening: "), (done.returncode, done.stdout, done.stderr)


# --- processes ---

FORK = """
import os, signal, sys
import qap_gguf as qap
files, threads = qap.packaged_model(), int(sys.argv[1])
vlm = qap.VisionModel(n_threads=threads, n_ctx=256)
handler = qap.ChatHandler(files.mmproj, n_threads=threads)
ask = [files.sample, "How many objects are there?"]
calls = {
    "generate": lambda: vlm.generate(ask),
    "encode": lambda: vlm.encode(files.sample),
    "handler": lambda: handler(llama=vlm.language_model, messages=[{"role": "user", "content": ask}]),
    "another": lambda: qap.VisionModel(n_threads=threads, n_ctx=256).generate(ask),
    "cache": lambda: vlm.cache.stats,
}
calls["generate"]()
calls["handler"]()
for name, call in calls.items():
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            call()
            print(name, "done", flush=True)
        except qap.QapError as err:
            print(name, "spawn" in str(err), flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, name
"""


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "said"), [(1, "done"), (2, "True")])
def test_a_forked_process_answers_or_says_why_not(threads: int, said: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(threads)], capture_output=True, text=True, timeout=240, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    names = ("generate", "encode", "handler", "another")
    assert done.stdout.split() == [*(word for name in names for word in (name, said)), "cache", "done"]


def test_ctrl_c_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with qap.VisionModel(n_threads=1, n_ctx=2048) as vlm:
        image = vlm.encode(FILES.sample)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

        def ask() -> None:
            for _ in range(1000):
                vlm.generate([image, "How many? " * 300], prune=None, max_tokens=2)
                vlm._language.reset()

        with pytest.raises(KeyboardInterrupt):
            ask()
        assert vlm.generate([image, QUESTION], prune=None) == "four"
    assert capfd.readouterr() == ("", "")


def test_a_picture_is_refused_in_the_words_of_the_limit() -> None:
    with qap.VisionModel(n_threads=1, n_ctx=64) as vlm:
        vlm._encoder.max_tokens = 100
        with pytest.raises(ImageError, match=r"^image: expected at most 100 tokens \(max_image_tokens\), got 144 for "):
            vlm.generate([FILES.sample, QUESTION], prune=None)
