"""`check_files` and the command on addresses and hub ids: as for files here, from the headers alone."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap
from convert.gguf_files import LLAVA_KEYS, LLAVA_TENSORS, build
from dropin.children import outcome
from files.far_server import WEB, FarServer, serving_files
from gguf_mutations import Gguf, Key, write
from qap_gguf.cli import main
from qap_gguf.errors import ConfigError

PACKAGED = qap.packaged_model()
GIB = 1 << 30


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FarServer]:
    """The packaged files, followed by a GiB of nothing: a server that sends whole files would show."""
    monkeypatch.setenv("QAP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "far"
    folder.mkdir()
    for path, name in ((PACKAGED.model, "tiny-Q4_0.gguf"), (PACKAGED.mmproj, "mmproj-tiny-f16.gguf")):
        with (folder / name).open("wb") as file:
            file.write(path.read_bytes())
            file.truncate(GIB)
    (folder / "README.md").write_text("tiny")
    with serving_files(folder) as server:
        yield server


def test_a_pair_by_address_is_what_it_is_here(far: FarServer, tmp_path: Path) -> None:
    here = qap.check_files(PACKAGED.mmproj, PACKAGED.model)
    urls = [f"{far.url}/{way}?x=1" for way in ("ranges/mmproj-tiny-f16.gguf", "to/tiny-Q4_0.gguf")]
    report = qap.check_files(*urls)
    assert report.ok
    for found, local, url in zip(report.files, here.files, urls, strict=True):
        assert (found.path, found.size) == (url.removesuffix("?x=1"), GIB)
        assert found.n_read is not None
        assert local.n_read is local.size is None
        assert dataclasses.replace(found, path=local.path, n_read=None, size=None) == local
    assert sum(file.n_read or 0 for file in report.files) == far.sent < 6 << 20
    (pair,), (local_pair,) = report.pairs, here.pairs
    assert (pair.mmproj, pair.model) == tuple(file.path for file in report.files)
    assert dataclasses.replace(pair, mmproj=local_pair.mmproj, model=local_pair.model) == local_pair
    assert not (tmp_path / "cache").exists()  # what was not tried with its weights is not remembered
    assert json.loads(json.dumps(report.to_dict()))["files"][1]["size"] == GIB


def test_a_server_without_ranges(far: FarServer) -> None:
    (file,) = qap.check_files(f"{far.url}/whole/mmproj-tiny-f16.gguf").files
    assert (file.error, file.width, file.n_read, file.size) == (None, 256, 1 << 20, GIB)
    assert far.sent < GIB // 8  # what sockets hold, for a moment


def test_far_and_near_mix(far: FarServer, tmp_path: Path) -> None:
    other = build(tmp_path / "other.gguf", LLAVA_KEYS, LLAVA_TENSORS)
    report = qap.check_files(other, PACKAGED.mmproj, f"{far.url}/ranges/tiny-Q4_0.gguf")
    assert [pair.fits for pair in report.pairs] == [False, True]
    assert report.pairs[1].positions == ("compact", "keep")


def test_what_cannot_be_used_is_named_by_its_address(far: FarServer) -> None:
    model = Gguf(PACKAGED.model.read_bytes())
    deadly = [Key(b"paddleocr.block_count", key.kind, struct.pack("<I", 65536), 0)
              if key.name == b"paddleocr.block_count" else key for key in model.keys]  # fmt: skip
    (far.folder / "deadly.gguf").write_bytes(write(deadly, model.tensors))
    (far.folder / "cut.gguf").write_bytes(PACKAGED.mmproj.read_bytes()[:-1000])
    urls = [f"{far.url}/ranges/{name}.gguf" for name in ("none", "deadly", "cut")]
    report = qap.check_files(*urls)
    assert [file.kind for file in report.files] == ["unreadable", "language model", "unreadable"]
    for file, words in zip(report.files, ("status 404", "block_count in 1..512", "is cut short"), strict=True):
        assert words in (file.error or "")
        assert str(file.path) in (file.error or "")
        assert "qap-check" not in (file.error or "")
    assert not report.ok


def parts_of(folder: Path, name: str, n_parts: int) -> None:
    """The packaged language model in parts, as llama-gguf-split makes them."""
    model = Gguf(PACKAGED.model.read_bytes())
    step = -(-len(model.tensors) // n_parts)
    for i in range(n_parts):
        tensors = model.tensors[i * step : (i + 1) * step]
        split = [("split.no", 2, struct.pack("<H", i)), ("split.count", 2, struct.pack("<H", n_parts)),
                 ("split.tensors.count", 5, struct.pack("<i", len(model.tensors)))]  # fmt: skip
        keys = [*(model.keys if i == 0 else ()), *(Key(key.encode(), kind, value, 0) for key, kind, value in split)]
        (folder / f"{name}-{i + 1:05}-of-{n_parts:05}.gguf").write_bytes(write(keys, tensors))


def test_a_model_in_parts(far: FarServer) -> None:
    parts_of(far.folder, "big", 3)
    report = qap.check_files(PACKAGED.mmproj, f"{far.url}/ranges/big-00001-of-00003.gguf")
    assert report.ok, report.files[1].error
    whole = qap.check_files(PACKAGED.model).files[0]
    assert dict(report.files[1].weights) == dict(whole.weights)
    assert report.files[1].size == sum(path.stat().st_size for path in far.folder.glob("big-*"))
    (far.folder / "big-00003-of-00003.gguf").unlink()
    (file,) = qap.check_files(f"{far.url}/ranges/big-00001-of-00003.gguf").files
    assert "big-00003-of-00003.gguf, the server answers with status 404" in (file.error or "")


def test_plain_http_only_where_it_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = qap.check_files(f"{WEB}example/a.gguf").files
    assert "use https, or allow plain http (--allow-http)" in (file.error or "")
    assert main(["convert", "--check", f"{WEB}example/a.gguf"]) == 1
    assert f"{WEB}example/a.gguf: unreadable" in capsys.readouterr().out
    assert main(["convert", "a", "b", "--allow-http"]) == 2
    assert "--allow-http has a meaning with --check only" in capsys.readouterr().err


def test_the_command_on_addresses(far: FarServer, plain_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (far.folder / "plain.gguf").write_bytes(plain_model.read_bytes())
    mmproj, model = f"{far.url}/ranges/mmproj-tiny-f16.gguf", f"{far.url}/ranges/plain.gguf"
    assert main(["convert", "--check", mmproj, model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{mmproj}: mmproj, mlp"
    assert lines[1] == f"  read: 1,048,576 of {GIB:,} bytes, the header; nothing was tried that needs its weights"
    assert lines[3] == "  image: image_size 192, patch_size 16"
    cure = "relabel with qap-gguf convert --keep-positions MODEL.gguf OUT.gguf"
    assert lines[-2:] == [f"{mmproj} with {model}: fits", f"  positions: compact only; {cure}"]


# --- the hub ---

needs_hub = pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="needs the extra hub")


@pytest.fixture
def command(far: FarServer, tmp_path: Path) -> Any:
    """`qap-gguf convert --check WORDS` in a process whose hub is the far server."""

    def run(*words: str, **env: str) -> Any:
        given = {"HF_ENDPOINT": far.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
        return outcome([sys.executable, "-m", "qap_gguf", "convert", "--check", *words], env=given)

    return run


@needs_hub
def test_a_pair_by_its_id(far: FarServer, command: Any, tmp_path: Path) -> None:
    """Login for the hub, none for the server that has the files; nothing goes to the hub's cache."""
    with serving_files(far.folder) as store:
        far.leads_to, far.token = store.url, "hf_secret"
        done = command("someone/tiny", "--json", HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert [file["path"] for file in report["files"]] == [
            "someone/tiny/tiny-Q4_0.gguf", "someone/tiny/mmproj-tiny-f16.gguf",
        ]  # fmt: skip
        assert sum(file["n_read"] for file in report["files"]) == store.sent < 6 << 20
        assert report["pairs"][0]["fits"]
        assert {headers.get("Authorization", headers.get("authorization")) for _, headers in far.asked} == {
            "Bearer hf_secret"
        }
        assert not any("authorization" in {name.lower() for name in headers} for _, headers in store.asked)
    assert not list((tmp_path / "hf").rglob("*.gguf"))


@needs_hub
def test_ids_that_lead_nowhere(far: FarServer, command: Any) -> None:
    for words, said in (
        ("someone/else", "found none; check the id"),
        ("someone/tiny:Q8_0", "expected one file for Q8_0, the repository has tiny-Q4_0.gguf"),
    ):
        done = command(words)
        assert (done.returncode, done.stderr) == (1, "")
        assert f"{words}: unreadable\n  error: " in done.stdout
        assert said in done.stdout
    far.gated = True
    done = command("someone/tiny:Q4_0")
    assert done.returncode == 1
    assert done.stdout.count("status 403; it gives no access: accept the model's terms") == 2
    assert far.sent == 0


@needs_hub
def test_without_a_network_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from files.test_hub import add_to_cache

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    add_to_cache(tmp_path / "hub", "someone/tiny")
    report = qap.check_files("someone/tiny")
    assert report.ok
    assert [Path(file.path).name for file in report.files] == ["tiny-llava-Q4_0.gguf", "mmproj-f16.gguf"]
    assert all(file.n_read is None and Path(file.path).exists() for file in report.files)
    (file,) = qap.check_files("someone/else").files
    assert "unset HF_HUB_OFFLINE" in (file.error or "")


def test_a_path_goes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "tiny").symlink_to(PACKAGED.mmproj)
    monkeypatch.chdir(tmp_path)
    assert qap.check_files("someone/tiny").files[0].path == Path("someone/tiny")
    assert "cannot open" in (qap.check_files("someone/none.gguf").files[0].error or "")


def test_an_id_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="extra hub"):
        qap.check_files("someone/tiny")
