"""The documentation's commands and snippets run as they stand, in their order, in a folder with stand-ins.

What cannot run here has a comment before its block, ``<!-- not run: reason -->``, and is counted. The stand-ins are
files of the names that the documents use for the reader's own: the packaged pair, its sample picture, two questions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+?) -->\n\s*)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Why a block may not run; anything else is to be fixed.
_REASONS = re.compile(r"\b(hub|network|GPU|minutes|hours?|torch|checkpoint)\b")
#: Runs the pieces of a document one after another, Python in one namespace; a server stays until the end.
DRIVER = """
import json, shlex, subprocess, sys, time
names, servers = {"__name__": "__main__"}, []
for number, (language, text) in enumerate(json.load(open("pieces.json"))):
    print("piece", number, flush=True)
    if language == "python":
        exec(compile(text, f"piece {number}", "exec"), names)
    elif "qap-gguf serve" in text:
        servers.append(subprocess.Popen(shlex.split(text, comments=True), stdout=subprocess.PIPE, text=True))
        assert servers[-1].stdout.readline().startswith("qap-gguf serves"), text
    else:
        done = subprocess.run(["sh", "-ec", text], stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (text, done.returncode)
for server in servers:
    server.terminate()
    server.wait(30)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why it does not run."""

    language: str
    text: str
    reason: str | None


def blocks_of(path: Path) -> list[Block]:
    found = _BLOCK.findall(path.read_text(encoding="utf-8"))
    return [Block(language, text, reason or None) for reason, language, text in found if language in ("sh", "python")]


def commands_of(text: str) -> list[str]:
    """The commands of a shell block that are ours or Python's, or make what they need; continued lines are one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("qap-gguf", "python ", "mkdir ", "cp "))]


def pieces_of(block: Block) -> list[tuple[str, str]]:
    return [("python", block.text)] if block.language == "python" else [("sh", c) for c in commands_of(block.text)]


@pytest.fixture
def place(tmp_path: Path, plain_model: Path) -> Path:
    """A folder with what the documents speak of."""
    files = qap.packaged_model()
    for name, target in (("mmproj-f16.gguf", files.mmproj), ("model-Q4_K_M.gguf", plain_model)):
        (tmp_path / name).symlink_to(target)
    for name in ("tools", "examples", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(files.sample, tmp_path / "photo.png")
    with Image.open(files.sample) as image:
        for name in ("photo.jpg", "cat.jpg"):
            image.convert("RGB").save(tmp_path / name, quality=95)
    rows = [("What is in row 1, column 2?", "house"), ("How many objects are there?", "four")]
    (tmp_path / "photos").mkdir()
    shutil.copy(files.sample, tmp_path / "photos" / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "photo.png", "prompt": "What is in row 1, column 2?"}\n')
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    (tmp_path / "openai-batch.jsonl").write_text(json.dumps({"custom_id": "1", "body": asked}) + "\n")
    questions = [json.dumps({"image": "photo.png", "question": q, "answer": a}) + "\n" for q, a in rows]
    (tmp_path / "questions.jsonl").write_text("".join(questions))
    return tmp_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_port(language: str, text: str, port: int) -> str:
    """The same with a port that is free: 8000 may be somebody's."""
    if language == "python":
        return text.replace(":8000", f":{port}")
    start = "qap-gguf serve"
    return text.partition("  #")[0].replace(start, f"{start} --port {port}", 1) if text.startswith(start) else text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_snippets(path: Path, place: Path) -> None:
    blocks = blocks_of(path)
    port = free_port()
    pieces = [
        (language, with_port(language, text, port))
        for block in blocks if block.reason is None for language, text in pieces_of(block)
    ]  # fmt: skip
    skipped = sum(len(pieces_of(block)) for block in blocks if block.reason is not None)
    print(f"{path.name}: {len(pieces)} commands and snippets run, {skipped} not run")
    if not pieces:
        return
    if any("qap-gguf batch" in text for _, text in pieces):
        from serve.conftest import find_program_or_skip

        find_program_or_skip()
    if any("serve" in text for _, text in pieces):
        pytest.importorskip("uvicorn", reason="needs the extra serve")
        pytest.importorskip("openai", reason="needs the openai client")
        from serve.conftest import find_program_or_skip

        find_program_or_skip()
    (place / "pieces.json").write_text(json.dumps(pieces))
    path_of_commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path_of_commands, "QAP_CACHE": str(place / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=place, env=environment, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    assert done.stdout.count("piece ") == len(pieces)


def test_what_is_not_run_says_why() -> None:
    reasons = [(path.name, block.reason) for path in DOCUMENTS for block in blocks_of(path) if block.reason]
    assert reasons
    for name, reason in reasons:
        assert _REASONS.search(reason or ""), (name, reason)


def test_the_reader_of_markdown(tmp_path: Path) -> None:
    """A block that is marked is known as such, one after it is not; continued lines are one command."""
    path = tmp_path / "a.md"
    path.write_text(
        "<!-- not run: needs a GPU -->\n\n```sh\nqap-gguf a\n```\n\ntext\n\n"
        "```sh\nmake x\nqap-gguf b \\\n  c\npython d\n```\n"
        "```python\n1\n```\n```json\n{}\n```\n"
    )
    first, second, third = blocks_of(path)
    assert first == Block("sh", "qap-gguf a\n", "needs a GPU")
    assert (second.reason, third) == (None, Block("python", "1\n", None))
    assert commands_of(second.text) == ["qap-gguf b    c", "python d"]
