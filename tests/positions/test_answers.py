"""A relabelled language model in every way of asking: answers, reuse, the context, the handlers, the cache folder."""

from __future__ import annotations

import base64
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import llama_chat_format

import qap_gguf as qap
from demo_questions import texts_in_use
from positions.language_files import nmse
from qap_gguf.cli.main import main
from qap_gguf.convert.relabel.cache import relabelled_copy

FILES = qap.packaged_model()
QUESTIONS = [f"What is in row {row}, column {column}?" for row in range(1, 5) for column in range(1, 5)]
QUESTIONS += [f"{start} objects are {what}?" for start in ("How many", "Which") for what in ("red", "there", "left")]
KEEP = qap.PruneConfig(n_keep=18, positions="keep")


@pytest.fixture(scope="module")
def vlm() -> Any:
    with qap.VisionModel(n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def image(vlm: qap.VisionModel) -> qap.ImageEmbedding:
    return vlm.encode(FILES.sample)


@pytest.mark.parametrize("prune", [None, qap.PruneConfig(n_keep=36, positions="compact")], ids=["dense", "compact"])
def test_greedy_answers_are_those_of_the_original(
    vlm: qap.VisionModel, plain_model: Path, prune: qap.PruneConfig | None
) -> None:
    with qap.VisionModel(FILES.mmproj, plain_model, n_threads=1) as plain:
        image, other = plain.encode(FILES.sample), vlm.encode(FILES.sample)
        np.testing.assert_array_equal(other.features, image.features)
        for question in QUESTIONS:
            want = plain.generate([image, question], prune=prune, max_tokens=8)
            logits = plain.last_logits()
            assert vlm.generate([other, question], prune=prune, max_tokens=8) == want
            assert nmse(vlm.last_logits(), logits) <= 1e-4
            assert vlm._language.n_past == plain._language.n_past


def test_logits_along_a_hundred_prompts_are_those_of_the_original(plain_model: Path) -> None:
    """Prompts of random tokens, which a model of few words answers by chance: its best two are often near a tie."""
    load = partial(llama_cpp.Llama, n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    both: list[Any] = [load(str(path)) for path in (FILES.model, plain_model)]
    random = np.random.default_rng(3)
    for _ in range(100):
        tokens = random.integers(3, both[0].n_vocab(), random.integers(2, 40)).tolist()
        for _ in range(6):
            for llama in both:
                llama.eval(tokens)
            got, want = (np.array(llama.scores[llama.n_tokens - 1]) for llama in both)
            assert nmse(got, want) <= 1e-4
            tokens = [int(want.argmax())]
        for llama in both:
            llama.reset()
    for llama in both:
        llama.close()


def test_greedy_continuations_of_a_hundred_prompts_are_equal(plain_model: Path) -> None:
    """Of questions that the model knows, so that its words are no chance."""
    both = (FILES.model, plain_model)
    first, second = (llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False) for path in both)
    for text in [text for text in texts_in_use() if text.startswith("\n")][:100]:
        prompt = first.tokenize(f"<|im_start|>user{text}".encode(), add_bos=False, special=True)
        said = []
        for llama in (first, second):
            tokens = llama.generate(prompt, temp=0.0)
            said.append([token for _, token in zip(range(6), tokens, strict=False)])
        assert said[0] == said[1]
    first.close()
    second.close()


def test_auto_is_keep(vlm: qap.VisionModel, image: qap.ImageEmbedding) -> None:
    found = {}
    for positions in ("auto", "keep", "compact"):
        cfg = KEEP.replace(positions=positions)
        vlm.generate([image, QUESTIONS[0]], prune=cfg, max_tokens=1)
        found[positions] = (vlm.prune(image, cfg).positions.tolist(), vlm._language.n_past, vlm._language.n_kv)
    assert found["auto"] == found["keep"] != found["compact"]
    assert found["keep"][1] - found["compact"][1] == 144 - 18
    assert found["keep"][2] == found["compact"][2]


def test_reuse_changes_no_bit(vlm: qap.VisionModel, image: qap.ImageEmbedding) -> None:
    parts = [image, image]
    vlm.forget()
    list(vlm.generate([*parts, QUESTIONS[0]], prune=KEEP, max_tokens=4, stream=True))
    again = vlm.generate([*parts, QUESTIONS[1]], prune=KEEP, max_tokens=1, stream=True)
    reused, answer = vlm.last_logits(), "".join(again)
    assert 36 <= again.stats.n_reused < again.stats.n_kv
    vlm.forget()
    fresh = vlm.generate([*parts, QUESTIONS[1]], prune=KEEP, max_tokens=1, stream=True)
    np.testing.assert_array_equal(vlm.last_logits(), reused)
    assert (fresh.stats.n_reused, "".join(fresh)) == (0, answer)
    assert fresh.stats.n_kv == again.stats.n_kv


@pytest.mark.parametrize("logits_all", [False, True])
def test_the_context_counts_cells_not_positions(
    vlm: qap.VisionModel, image: qap.ImageEmbedding, logits_all: bool
) -> None:
    """300 positions of dense images do not fit 96 cells, their 36 kept tokens do."""
    parts = [image, image, QUESTIONS[0]]
    want = vlm.generate(parts, prune=KEEP, max_tokens=8)
    settings: dict[str, Any] = {"n_ctx": 96, "n_threads": 1, "verbose": False, "logits_all": logits_all}
    llama = llama_cpp.Llama(str(FILES.model), **settings)
    with qap.VisionModel(FILES.mmproj, llama, n_threads=1) as small:
        assert small.generate(parts, prune=KEEP, max_tokens=8) == want
        assert len(llama.input_ids) > 288
        long = small.generate(parts, prune=KEEP, max_tokens=500, temperature=1.5, stream=True)
        assert "".join(long)
        assert long.stats.n_kv <= 96
        with pytest.raises(qap.ConfigError, match="at most 96 tokens"):
            small.generate(parts, prune=None)
        llama.reset()  # type: ignore[no-untyped-call]
        assert llama._n_ctx == llama.n_ctx()
    llama.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_chat_handler_fills_the_cells_that_there_are(stream: bool) -> None:
    handler = qap.ChatHandler(FILES.mmproj, KEEP)
    llama = llama_cpp.Llama(str(FILES.model), n_ctx=64, n_threads=1, verbose=False, chat_handler=handler)
    content: Any = [{"type": "image_url", "image_url": FILES.sample}, {"type": "text", "text": QUESTIONS[0]}]
    messages: Any = [{"role": "user", "content": content}]
    found: Any = llama.create_chat_completion(
        messages, max_tokens=500, temperature=2.0, logit_bias={2: -100.0}, stream=stream, seed=1
    )
    reason = [*found][-1]["choices"][0]["finish_reason"] if stream else found["choices"][0]["finish_reason"]
    assert reason in ("length", "stop")
    assert llama.n_tokens > 144
    handler.close()
    llama.close()


def test_stock_handlers_keep_places_too() -> None:
    """Stock and ours agree on every logarithm of a probability."""
    llama = llama_cpp.Llama(str(FILES.model), n_ctx=1024, n_threads=1, verbose=False, logits_all=True)
    stock = llama_chat_format.Llava15ChatHandler(clip_model_path=str(FILES.mmproj), verbose=False)
    ours = qap.ChatHandler(FILES.mmproj, chat_format="llava-1-5", flash_attn=False)
    picture = base64.b64encode(FILES.sample.read_bytes()).decode()
    content: Any = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": QUESTIONS[0]},
    ]
    messages: Any = [{"role": "user", "content": content}]
    found: list[Any] = []
    for prune in (KEEP, KEEP.replace(positions="compact"), None):
        for handler in (stock, ours):
            llama.chat_handler = handler
            with qap.use(prune), ours.use(prune):
                made: Any = llama.create_chat_completion(
                    messages, max_tokens=4, temperature=0.0, logprobs=True, top_logprobs=3
                )
            kept = [token["logprob"] for token in made["choices"][0]["logprobs"]["content"]]
            found.append((np.round(kept, 4).tolist(), llama.n_tokens))
    assert found[0] == found[1] != found[2] == found[3] != found[4] == found[5]
    assert found[0][1] == found[4][1]  # the text resumes where it would without pruning
    ours.close()
    llama.close()


# --- copies that are made in passing ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "relabelled"


def test_a_copy_is_made_once_and_replaced_with_its_original(cache: Path, tmp_path: Path, plain_model: Path) -> None:
    model = tmp_path / "model[1].gguf"
    shutil.copy(plain_model, model)
    seen: list[int] = []
    copy = relabelled_copy(model, lambda done, *_: seen.append(done))
    assert copy.parent == cache
    assert copy.read_bytes() == FILES.model.read_bytes()
    stamp, n = copy.stat().st_mtime_ns, len(seen)
    assert relabelled_copy(model, lambda done, *_: seen.append(done)) == copy
    assert (copy.stat().st_mtime_ns, len(seen)) == (stamp, n)
    model.touch()
    other = relabelled_copy(model)
    assert other != copy
    assert list(cache.iterdir()) == [other]
    assert relabelled_copy(other) == other  # can keep them as it is


def test_the_vision_model_makes_its_copy(cache: Path, plain_model: Path) -> None:
    with qap.VisionModel(positions="keep", n_threads=1) as vlm:
        assert vlm.language_model.model_path == str(FILES.model)  # can keep them as it is
    assert not cache.exists()
    with qap.VisionModel(FILES.mmproj, plain_model, positions="keep", n_threads=1) as vlm:
        assert Path(vlm.language_model.model_path).parent == cache
        assert vlm.generate([FILES.sample, "How many objects are there?"], prune=KEEP, max_tokens=4)
    llama = llama_cpp.Llama(str(plain_model), n_ctx=512, n_threads=1, verbose=False)
    with pytest.raises(qap.UnsupportedError, match="relabel its file with qap-gguf convert --keep-positions MODEL OUT"):
        qap.VisionModel(FILES.mmproj, llama, positions="keep", n_threads=1)
    handler = qap.ChatHandler(FILES.mmproj, KEEP)
    content: Any = [{"type": "image_url", "image_url": FILES.sample}, {"type": "text", "text": "?"}]
    with pytest.raises(qap.UnsupportedError, match="qap-gguf convert --keep-positions MODEL OUT"):
        handler(llama=llama, messages=[{"role": "user", "content": content}])
    llama.close()
    with pytest.raises(qap.ConfigError, match="positions"):
        qap.VisionModel(FILES.mmproj, FILES.model, positions="near")


def test_run_makes_its_copy_and_says_so(cache: Path, plain_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mmproj", str(FILES.mmproj), "-m", str(plain_model), "--image", str(FILES.sample)]
    assert main(["run", *words, "-p", QUESTIONS[0], "--positions", "keep", "--threads", "1", "--json"]) == 0
    (copy,) = cache.iterdir()
    said = capsys.readouterr()
    assert f"--positions keep: {copy} is {plain_model.name}, relabelled" in said.err
    assert json.loads(said.out)["config"]["positions"] == "keep"


def test_the_command_relabels_undoes_and_checks(
    plain_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = tmp_path / "new.gguf", tmp_path / "old.gguf"

    def convert(*words: str | Path) -> tuple[int, str, str]:
        status = main(["convert", *map(str, words)])
        return (status, *capsys.readouterr())

    status, said, why = convert("--keep-positions", plain_model, new)
    assert (status, said) == (0, f"{new}\n")
    assert "new.gguf is relabelled, " in why
    assert "stock llama.cpp misplaces the images of such a file, silently; --undo gives the original back" in why
    assert new.read_bytes() == FILES.model.read_bytes()
    done = convert("--keep-positions", "--undo", new, old, "--json")
    assert json.loads(done[1]) == {"model": str(old), "undo": True}
    assert old.read_bytes() == plain_model.read_bytes()
    said = convert("--check", FILES.mmproj, new, plain_model)[1]
    assert "  positions: keep\n" in said
    cure = f"relabel with qap-gguf convert --keep-positions {plain_model} OUT.gguf"
    assert f"  positions: compact only; {cure}\n" in said
    assert said.count("get one position with a relabelled language model") == 1
    assert convert("--undo", new, old)[0] == 2
    assert convert("--keep-positions", "--quantize", "Q8_0", new, old)[0] == 2
    status, _, why = convert("--keep-positions", FILES.mmproj, tmp_path / "x.gguf")
    assert (status, why.count("\n")) == (1, 1)
    assert "expected a language model, got an mmproj" in why
