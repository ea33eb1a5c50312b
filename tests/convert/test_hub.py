"""A model's id in place of a folder, out of a cache laid out as huggingface_hub does it, without network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qap_gguf.convert import convert
from qap_gguf.convert.source import hub
from qap_gguf.errors import ConvertError

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, errors  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_to_cache(source: Path, cache: Path, repo: str) -> Path:
    """The files of `source` as snapshot_download would have left them; returns the snapshot's folder."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in source.iterdir():
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("source", ["someone/tiny-llava", "someone/tiny-llava@main", f"someone/tiny-llava@{COMMIT}"])
def test_an_id_gives_the_folders_files(plain_llava: Path, offline: Path, tmp_path: Path, source: str) -> None:
    want = convert(plain_llava, tmp_path / "want", quantize="F16", name="tiny-llava")
    snapshot = add_to_cache(plain_llava, offline, "someone/tiny-llava")
    got = convert(source, tmp_path / "got", quantize="F16")
    assert got.model.name == want.model.name == "tiny-llava-F16.gguf"
    assert got.model.read_bytes() == want.model.read_bytes()
    assert got.mmproj.read_bytes() == want.mmproj.read_bytes()
    assert convert(snapshot, tmp_path / "direct", quantize="F16").model.name == "tiny-llava-F16.gguf"


def test_the_command_obeys_the_environment(plain_llava: Path, tmp_path: Path) -> None:
    add_to_cache(plain_llava, tmp_path / "hub", "someone/tiny")
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(source: str, out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qap_gguf", "convert", source, out, "--quantize", "F16", "--json"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    done = run("someone/tiny", "out")
    assert (done.returncode, json.loads(done.stdout)["model"]) == (0, "out/tiny-F16.gguf"), done.stderr
    gone = run("someone/else", "out2")
    assert (gone.returncode, gone.stdout, gone.stderr.count("\n")) == (1, "", 1)
    assert "unset HF_HUB_OFFLINE" in gone.stderr


def test_the_folder_goes_first(
    plain_llava: Path, offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "tiny").symlink_to(plain_llava)
    monkeypatch.chdir(tmp_path)
    assert hub.fetch("someone/tiny") == Path("someone/tiny")
    assert convert("someone/tiny", tmp_path / "out", quantize="F16").model.is_file()


@pytest.mark.parametrize(
    "source", ["/no/such", "./no/such", "no/such/folder", "../such", "no", "~/such", "a b/c", "a/b@"]
)
def test_a_path_never_reaches_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert hub.fetch(source) == Path(source)


class Remote:
    """Stands in for snapshot_download: the files of a folder, and what was asked for."""

    def __init__(self, files: dict[str, str], place: Path) -> None:
        self.files, self.place, self.asked = files, place, list[list[str]]()

    def __call__(self, repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        import fnmatch

        self.asked.append(allow_patterns)
        self.place.mkdir(exist_ok=True)
        for name, text in self.files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns) and "/" not in name:
                (self.place / name).write_text(text)
        return str(self.place)


CONFIG = json.dumps({"model_type": "llava"})
INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
BOTH = {"model.safetensors": "", "pytorch_model.bin": "", "tf_model.h5": "", "onnx/model.onnx": "", "x.py": ""}
REPOS: dict[str, tuple[dict[str, str], set[str]]] = {
    "safetensors before torch": (BOTH, {"model.safetensors"}),
    "torch alone": ({"pytorch_model.bin": ""}, {"pytorch_model.bin"}),
    "only the shards that the index names": (
        {"model.safetensors.index.json": INDEX, "model-1-of-2.safetensors": "", "model-2-of-2.safetensors": "",
         "model-1-of-1.fp32.safetensors": "", "pytorch_model.bin": ""},
        {"model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REPOS))
def test_only_needed_files_are_fetched(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, want = REPOS[kind]
    remote = Remote(files | {"config.json": CONFIG, "tokenizer.model": ""}, tmp_path / "got")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", remote)
    folder = hub.fetch("a/b")
    assert {path.name for path in folder.iterdir()} == want | {"config.json", "tokenizer.model"}


def test_an_unknown_model_is_refused_before_its_weights_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote({"config.json": json.dumps({"architectures": ["FooForCausalLM"]})} | BOTH, tmp_path / "got")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", remote)
    with pytest.raises(ConvertError, match="FooForCausalLM"):
        convert("a/b", tmp_path / "out")
    assert len(remote.asked) == 1
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_there_is_seen_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "b-F16.gguf").touch()
    with pytest.raises(ConvertError, match="--force"):
        convert("a/b", tmp_path, quantize="F16")


def response_error(kind: type[Exception]) -> Callable[[], Exception]:
    def make() -> Exception:
        err = kind.__new__(kind)
        err.args = ("401 of the server\nand more",)
        return err

    return make


ERRORS: dict[str, tuple[Callable[[], Exception], str]] = {
    "gated": (response_error(errors.GatedRepoError), "wants its terms accepted"),
    "no such model": (response_error(errors.RepositoryNotFoundError), "found neither; check the spelling"),
    "no such revision": (response_error(errors.RevisionNotFoundError), "expected revision v9 of a/b"),
    "server": (response_error(errors.HfHubHTTPError), r"cannot fetch a/b from the hub \(HfHubHTTPError"),
    "network": (lambda: OSError("no route\nto host"), r"\(OSError: no route to host\); try again"),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_what_the_hub_says_is_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = ERRORS[case]

    def fail(*_: object, **__: object) -> None:
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConvertError, match=words) as caught:
        convert("a/b@v9", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConvertError, match=r"expected a folder a/b, .* pip install huggingface_hub"):
        convert("a/b", tmp_path / "out")
