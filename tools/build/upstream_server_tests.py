#!/usr/bin/env python3
"""Run llama.cpp's own tests of llama-server (tools/server/tests of the pinned sources) against ours.

    make programs && python tools/build/upstream_server_tests.py                  # vision and chat completion
    python tools/build/upstream_server_tests.py unit/test_stream.py -k resume     # others; words go to pytest

Upstream's tests download models and pictures. Here each model is the packaged one, and each picture the packaged
sample, which a web server on the loopback gives out. What another model says, and how many tokens its prompts have,
is not compared: such values of a test's parameters equal everything. All else is. Tests that cannot run so are
deselected below, with the reason. Needs requests and filelock, which huggingface_hub and torch bring.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import qap_gguf as qap
from qap_gguf.serve.child import find_program

FETCH = Path(__file__).resolve().with_name("fetch_upstream.py")
FILES = ("unit/test_vision_api.py", "unit/test_chat_completion.py")
#: Part of a test's name -> why it cannot run here.
DESELECTED = {
    "test_chat_template": "compares the prompt of another model's tokenizer",
    "test_chat_completion_with_openai_library": "compares what another model says",
    "test_completion_with_json_schema.True-json_schema1-6": "another vocabulary needs fewer tokens for it",
    "test_chat_completion_cached_tokens": "compares counts of tokens of another model's prompts",
    "test_vision_embeddings(_oai_content)?": "the packaged model has no embeddings",
    "https:..ggml.ai": "needs the network",
    "google.com.404": "needs the network",
}
#: Takes the place of `wget`, which nothing calls where no model is downloaded.
_WGET = "def download(*args, **settings):\n    raise RuntimeError('nothing is downloaded here')\n"
#: llama-server with our files in place of those that a test names.
_WRAPPER = """#!{python}
import os, sys
words, out = iter(sys.argv[1:]), []
for word in words:
    if word in ("--hf-repo", "--hf-file", "--model", "--model-url", "--mmproj-url"):
        vision = "gemma3" in next(words) and word == "--hf-repo" or "--mmproj" in out
        out += ["--mmproj", {mmproj!r}] if vision and "--mmproj" not in out else []
    elif word != "--offline":
        out.append(word)
os.execv({program!r}, [{program!r}, "-m", {model!r}, "--threads", "1", *out])
"""
_CONFTEST = """
import base64
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest import mock

import pytest
import utils
from utils import *

SAMPLE = open({sample!r}, "rb").read()
OF_A_MODEL = ("n_prompt", "n_predicted", "re_content", "finish_reason", "batch_count")
DESELECTED = {deselected!r}


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(SAMPLE)))
        self.end_headers()
        self.wfile.write(SAMPLE)

    def log_message(self, *words):
        pass


PICTURES = HTTPServer(("127.0.0.1", 0), Pictures)
threading.Thread(target=PICTURES.serve_forever, daemon=True).start()


def picture(name):
    data = base64.b64encode(SAMPLE).decode()
    if name.startswith("IMG_URL"):
        return "http" + "://127.0.0.1:%d/sample.png" % PICTURES.server_address[1]
    if name.startswith("IMG_BASE64_URI"):
        return "data:image/png;base64," + data
    return data if name.startswith("IMG_BASE64") else name


def pytest_collection_modifyitems(config, items):
    for item in items:
        for part, why in DESELECTED.items():
            if re.search(part + r"(\\W|$)", item.nodeid):
                item.add_marker(pytest.mark.skip(reason=why))
        params = getattr(getattr(item, "callspec", None), "params", {{}})
        sent = "test_completion_with_" in item.nodeid  # where n_predicted goes into the request, and a grammar answers
        for name in () if sent and "-3000" not in item.nodeid else OF_A_MODEL:
            if params.get(name) is not None and not (sent and name == "n_predicted"):
                params[name] = mock.ANY
        if hasattr(item.module, "get_img_url"):
            item.module.get_img_url = picture
        item.module.match_regex = lambda expected, text: expected is mock.ANY or utils.match_regex(expected, text)


@pytest.fixture(autouse=True)
def stop_server_after_each_test():
    yield
    for server in set(utils.server_instances):
        server.stop()
"""


def lay_out(folder: Path) -> Path:
    """The tests in a folder of their own, with what they are run with; returns llama-server's stand-in."""
    fetched = subprocess.run([sys.executable, str(FETCH)], stdout=subprocess.PIPE, text=True, check=True)
    tree = Path(fetched.stdout.splitlines()[-1])
    tests = folder / "tools/server/tests"
    shutil.copytree(tree / "tools/server/tests", tests)
    (folder / "models").symlink_to(tree / "models")
    files, program = qap.packaged_model(), find_program()
    (tests / "wget.py").write_text(_WGET)
    (tests / "conftest.py").write_text(_CONFTEST.format(sample=str(files.sample), deselected=DESELECTED))
    wrapper = folder / "llama-server"
    names = {"model": str(files.model), "mmproj": str(files.mmproj), "program": str(program)}
    wrapper.write_text(_WRAPPER.format(python=sys.executable, **names))
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return wrapper


def main() -> int:
    """Run them; the exit status is pytest's."""
    words = sys.argv[1:] or list(FILES)
    with tempfile.TemporaryDirectory(prefix="qap-upstream-tests-") as name:
        wrapper = lay_out(Path(name))
        env = {**os.environ, "LLAMA_SERVER_BIN_PATH": str(wrapper), "LLAMA_CACHE": name, "PYTHONPATH": "."}
        command = [sys.executable, "-m", "pytest", "-q", "-rsf", "-p", "no:cacheprovider", *words]
        return subprocess.run(command, cwd=Path(name) / "tools/server/tests", env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
