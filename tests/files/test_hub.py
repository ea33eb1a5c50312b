"""Models by hub id: which files are taken, out of a cache as huggingface_hub lays it out, and errors in one line."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)
pytest.importorskip("huggingface_hub", reason="needs the extra hub")

import huggingface_hub
from huggingface_hub import constants, errors

import qap_gguf as qap
from dropin.children import outcome
from qap_gguf.cli import main
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.files.hub import choose, choose_mmproj, fetch_pair, split_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MMPROJS = ["mmproj-a-Q8_0.gguf", "mmproj-a-bf16.gguf", "mmproj-a-f16.gguf", "mmproj-a-f32.gguf"]
MODELS = ["a-Q2_K.gguf", "a-Q4_K.gguf", "a-Q4_K_M.gguf", "a-Q8_0.gguf", "a-f16.gguf", "a-imatrix.gguf"]
SPLIT = [f"big/b-Q6_K-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
FILES = ["README.md", "config.json", *MODELS, *SPLIT, *MMPROJS]


def add_to_cache(cache: Path, repo: str) -> None:
    """The packaged model as downloads would have left it."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    files = qap.packaged_model()
    for path in (files.model, files.mmproj):
        blob = root / "blobs" / hashlib.sha256(path.name.encode()).hexdigest()
        blob.symlink_to(path)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the packaged model, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    add_to_cache(tmp_path / "hub", "someone/tiny")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("wish", "models", "mmproj"),
    [
        ({}, ["a-Q4_K_M.gguf"], "mmproj-a-f16.gguf"),
        ({"quant": "q4_k"}, ["a-Q4_K.gguf"], "mmproj-a-f16.gguf"),
        ({"quant": "Q8_0"}, ["a-Q8_0.gguf"], "mmproj-a-f16.gguf"),
        ({"quant": "Q6_K"}, SPLIT, "mmproj-a-f16.gguf"),
        ({"filename": "*f16.gguf"}, ["a-f16.gguf"], "mmproj-a-f16.gguf"),
        ({"filename": "b-Q6_K*", "mmproj": "*Q8_0*"}, SPLIT, "mmproj-a-Q8_0.gguf"),
    ],
)
def test_which_files_are_taken(wish: dict[str, str], models: list[str], mmproj: str) -> None:
    assert choose(FILES, **wish) == (models, mmproj)


@pytest.mark.parametrize(
    ("files", "wish", "words"),
    [
        (FILES, {"quant": "Q5_K_M"}, "quantization: expected one file for Q5_K_M"),
        (FILES, {"filename": "a-*"}, "a-Q2_K.gguf, a-Q4_K.gguf"),
        (FILES, {"filename": "*mmproj*"}, "expected one file"),
        (MODELS, {}, "mmproj: expected one file"),
        (MMPROJS, {}, "filename: expected one file"),
        (["README.md"], {}, "no GGUF file"),
        (["x-1.gguf", "x-2.gguf", "mmproj.gguf"], {}, "x-1.gguf, x-2.gguf"),
    ],
)
def test_wishes_that_do_not_leave_one_file(files: list[str], wish: dict[str, str], words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        choose(files, **wish)


@pytest.mark.parametrize("side", ["mtp-", "eagle3-", "dflash-", "dspark-", "imatrix-"])
def test_models_that_draft_tokens_are_passed_over(side: str) -> None:
    files = [f"{side}a-Q4_K_M.gguf", "x/other-Q4_K_M.gguf", "mmproj.gguf"]
    assert choose(files) == (["x/other-Q4_K_M.gguf"], "mmproj.gguf")
    assert choose(files, quant="Q4_K_M") == (["x/other-Q4_K_M.gguf"], "mmproj.gguf")
    assert choose(files, filename=f"{side}*") == ([files[0]], "mmproj.gguf")


def test_other_names() -> None:
    assert choose(["only.gguf", "the-mmproj.gguf"]) == (["only.gguf"], "the-mmproj.gguf")
    assert choose_mmproj(["x.gguf", "mmproj-b-Q8_0.gguf", "mmproj-b-f32.gguf"]) == "mmproj-b-Q8_0.gguf"


@pytest.mark.parametrize("text", ["", "name", "a/b/c", "/a/b", "a/b:", "a b/c", "../a", "a/b:Q4 K", None])
def test_no_ids(text: Any) -> None:
    with pytest.raises(ConfigError, match="owner/name"):
        split_id(text)


def test_a_model_out_of_the_cache(offline: Path) -> None:
    for settings in ({"repo_id": "someone/tiny:Q4_0"}, {"repo_id": "someone/tiny", "filename": "*Q4_0.gguf"}):
        with qap.VisionModel.from_pretrained(n_ctx=448, n_threads=1, **settings) as vlm:
            assert vlm.generate([qap.packaged_model().sample, "What is in row 1, column 2?"], max_tokens=4) == "house"
    assert fetch_pair("someone/tiny", revision=COMMIT).model.parts[-3:] == ("snapshots", COMMIT, "tiny-llava-Q4_0.gguf")
    with pytest.raises(ConfigError, match="one of the two"):
        qap.VisionModel.from_pretrained("someone/tiny:Q4_0", "*.gguf")


def test_a_handler_out_of_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    add_to_cache(tmp_path, "someone/tiny")
    with qap.ChatHandler.from_pretrained("someone/tiny", cache_dir=tmp_path) as handler:
        files = qap.packaged_model()
        llm = llama_cpp.Llama(
            str(files.model), chat_handler=handler, n_ctx=448, n_threads=1, n_threads_batch=1, verbose=False
        )
        messages: Any = [{"role": "user", "content": [files.sample, "What is in row 1, column 2?"]}]
        answer: Any = llm.create_chat_completion(messages, temperature=0)
        assert answer["choices"][0]["message"]["content"] == "house"
        llm.close()


def test_not_in_the_cache_and_no_network(offline: Path, tmp_path: Path) -> None:
    for repo, settings in (
        ("someone/else", {}),
        ("someone/tiny", {"revision": "other"}),
        ("someone/tiny", {"cache_dir": tmp_path / "none"}),
    ):
        with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE") as caught:
            fetch_pair(repo, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="tiny-llava-Q4_0"):
        fetch_pair("someone/tiny", quant="Q8_0")


def refusal(kind: type[Exception]) -> Exception:
    err = kind.__new__(kind)
    err.args = ("401\nfrom the server",)
    return err


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, "terms"),
        (errors.RepositoryNotFoundError, "check the id"),
        (errors.RevisionNotFoundError, "revision"),
        (ConnectionError, "cannot be fetched"),
        (TimeoutError, "cannot be fetched"),
    ],
)
def test_what_the_hub_refuses(
    offline: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise refusal(kind)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(ModelFileError, match=words) as caught:
        fetch_pair("someone/else")
    assert "\n" not in str(caught.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="extra hub"):
        fetch_pair("a/b")


def test_the_command(tmp_path: Path) -> None:
    add_to_cache(tmp_path, "someone/tiny")
    env = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> Any:
        command = [sys.executable, "-m", "qap_gguf", "run", "--threads", "1", "-p", "What is in row 1, column 2?"]
        return outcome([*command, "--dense", "--max-tokens", "4", *words], env=env)

    done = run("--hf", "someone/tiny:Q4_0", "--json")
    assert json.loads(done.stdout)["answer"] == "house", done.stderr
    assert json.loads(done.stdout)["model"].endswith("tiny-llava-Q4_0.gguf")
    for words, code, message in (
        (["--hf", "someone/else"], 1, "HF_HUB_OFFLINE"),
        (["--hf", "else"], 1, "owner/name"),
        (["--hf", "someone/tiny", "-m", "a.gguf"], 2, "drop -m"),
    ):
        done = run(*words)
        assert done.returncode == code
        assert done.stdout == ""
        assert message in done.stderr


def test_every_command_that_takes_a_model_takes_an_id(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval` has a repeatable -m: there the id is the one model of the grid."""
    sample = qap.packaged_model().sample
    row = {"image": str(sample), "question": "What is in row 1, column 2?", "answer": "house"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    hub = ("--hf", "someone/tiny", "--threads", "1", "--json")
    folder = offline / "models--someone--tiny" / "snapshots" / COMMIT
    model, mmproj = str(folder / "tiny-llava-Q4_0.gguf"), str(folder / "mmproj-f16.gguf")

    def said(*words: str) -> Any:
        assert main([*words, *hub]) == 0
        return json.loads(capsys.readouterr().out)

    found = said("eval", str(tmp_path / "q.jsonl"), "--methods", "dense")
    assert (found["models"], found["mmproj"]) == ([model], mmproj)
    assert found["results"][0]["accuracy"] == 1.0
    found = said("score", str(sample), "--n-keep", "9")
    assert len(found["indices"]) == 9
    found = said("bench", "--rounds", "1", "--decode", "1", "--no-memory", "--image", str(sample))
    assert (found["model"], found["mmproj"]) == (model, mmproj)
    for command in (["eval", "q.jsonl"], ["score"], ["bench"], ["serve"], ["run", "-p", "x"]):
        for words, message in ((["-m", "a.gguf"], "drop -m"), (["--mmproj", "b.gguf"], "drop -m")):
            assert main([*command, "--hf", "someone/tiny", *words]) == 2
            said_so = capsys.readouterr()
            assert message in said_so.err
            assert said_so.out == ""
        assert main([*command, "--hf", "someone/else"]) == 1
        assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_a_server_takes_an_id(tmp_path: Path) -> None:
    from serve.conftest import URI, ask, serving

    add_to_cache(tmp_path, "someone/tiny")
    env = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    with serving("--hf", "someone/tiny:Q4_0", "--ctx", "512", "--dense", env=env) as server:
        assert server.get("/v1/models")[1]["data"][0]["id"] == "tiny-llava-Q4_0"
        assert server.post(ask(URI))[1]["choices"][0]["message"]["content"] == "house"
