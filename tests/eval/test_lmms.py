"""The plug-in for lmms-eval: registered where it looks, and the answers are those of VisionModel.

lmms-eval itself is far too large to install for a test; where it is missing, a class of its interface stands in.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import qap_gguf as qap
from qap_gguf.errors import ConfigError

pytest.importorskip("tqdm", reason="lmms-eval brings it")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if find_spec("lmms_eval") is None:
        base = type("lmms", (), {"rank": 0, "__init__": lambda self: setattr(self, "task_dict", {})})
        names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = base  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "qap_gguf.eval.lmms", raising=False)
    yield importlib.import_module("qap_gguf.eval.lmms")
    sys.modules.pop("qap_gguf.eval.lmms", None)


def request_of(doc: int, **wishes: Any) -> Any:
    def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": row["image"]}, {"type": "text", "text": row["question"]}]
        return [{"role": "user", "content": content}]

    return SimpleNamespace(args=("", messages, {"max_new_tokens": 8, **wishes}, doc, "scenes", "test"))


def rows() -> list[dict[str, Any]]:
    image = Image.open(qap.packaged_model().sample)
    return [{"image": image, "question": q} for q in ("How many objects are there?", "What is in row 1, column 2?")]


@pytest.mark.parametrize("settings", [{"dense": True}, {"n_keep": 18, "select": "topk"}, {}])
def test_answers_are_those_of_the_model(plugin: Any, settings: dict[str, Any]) -> None:
    model = plugin.QapGguf(threads=1, ctx=512, batch_size=4, **settings)
    model.task_dict = {"scenes": {"test": rows()}}
    found = model.generate_until([request_of(0), request_of(1, until=["\n\n", ""], temperature=0, do_sample=False)])
    chosen = {"prune": None} if "dense" in settings else {"prune": qap.PruneConfig(**settings)} if settings else {}
    with qap.VisionModel(n_threads=1) as vlm:
        expected = [vlm.generate([row["image"], row["question"]], max_tokens=8, **chosen).strip() for row in rows()]
    assert found == expected
    assert model.model.n_encodes == 1  # the same picture


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_keeep": 3}, "n_keeep"),
        ({"dense": True, "n_keep": 3}, "n_keep"),
        ({"n_keep": 0}, "n_keep"),
        ({"ctx": 0}, "n_ctx"),
    ],
)
def test_wrong_arguments_are_one_line(plugin: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plugin.QapGguf(**settings)


def test_a_video_is_refused(plugin: Any) -> None:
    with pytest.raises(ConfigError, match="video"):
        plugin.parts_of([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def test_lmms_eval_finds_it() -> None:
    (found,) = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "qap_gguf"]
    assert found.value == "qap_gguf.eval.lmms_manifest:manifest"
    pytest.importorskip("lmms_eval", reason="not installed")
    manifest = found.load()()
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
