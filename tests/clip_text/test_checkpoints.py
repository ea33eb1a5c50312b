"""CLIP checkpoints that do not fit the LLaVA, or are damaged: one line each, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qap_gguf as qap
from qap_gguf.errors import ConvertError

if TYPE_CHECKING:
    from clip_text.conftest import Clip

Edit = Callable[[Path], object]


def edit_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        data = json.loads((folder / file).read_text(encoding="utf-8"))
        change(data)
        (folder / file).write_text(json.dumps(data), encoding="utf-8")

    return edit


def remove(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def config(**values: Any) -> Edit:
    """Sets top-level keys, and with `text__`/`vision__` in front those of a section."""

    def change(data: dict[str, Any]) -> None:
        for key, value in values.items():
            section, _, name = key.partition("__")
            target = data[f"{section}_config"] if name else data
            target[name or key] = value

    return edit_json("config.json", change)


BOTH: dict[str, tuple[Edit, str]] = {
    "another model": (config(model_type="siglip"), "model_type clip"),
    "no config": (remove("config.json"), "config.json"),
    "no weights": (remove("model.safetensors"), "safetensors"),
    "another width": (config(vision__hidden_size=48), "32 wide"),
    "another depth": (config(text__num_hidden_layers=9), "more tensors"),
    "another projection": (config(projection_dim=99), "shape"),
    "unknown activation": (config(text__hidden_act="relu"), "hidden_act"),
    "no number": (config(text__num_attention_heads="four"), "integer"),
    "heads that do not divide": (config(text__num_attention_heads=7), "multiple"),
    "no epsilon": (config(text__layer_norm_eps=-1), "layer_norm_eps"),
    "no section": (config(text_config=[1]), "object"),
    "small vocabulary": (config(text__vocab_size=200), "token ids"),
    "another end": (config(text__eos_token_id=5), "eos_token_id"),
    "a list of ends": (config(text__eos_token_id=[1, 2]), "eos_token_id"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(30)), "header"),
}
OLD: dict[str, tuple[Edit, str]] = {
    "no merges": (remove("merges.txt"), "merges.txt"),
    "odd merges": (lambda f: (f / "merges.txt").write_text("a b c\n"), "two tokens"),
    "no end token": (edit_json("vocab.json", lambda v: v.pop("<|endoftext|>")), "eos_token"),
    "text as id": (edit_json("vocab.json", lambda v: v.update(a="x")), "token ids"),
    "no vocabulary": (lambda f: (f / "vocab.json").write_text("[1]"), "JSON object"),
}
NEW: dict[str, tuple[Edit, str]] = {
    "no suffix": (edit_json("tokenizer.json", lambda d: d["model"].update(end_of_word_suffix=None)), "</w>"),
    "no lower case": (edit_json("tokenizer.json", lambda d: d["normalizer"]["normalizers"].pop()), "normalizer"),
    "another pattern": (
        edit_json("tokenizer.json", lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x")),
        "pattern",
    ),
    "no pre-tokenizer": (edit_json("tokenizer.json", lambda d: d.pop("pre_tokenizer")), "pattern"),
    "dropout": (edit_json("tokenizer.json", lambda d: d["model"].update(dropout=0.1)), "dropout"),
    "no model": (edit_json("tokenizer.json", lambda d: d.pop("model")), "understand"),
    "a token with conditions": (
        edit_json("tokenizer.json", lambda d: d["added_tokens"][0].update(lstrip=True)),
        "added",
    ),
    "odd merges": (edit_json("tokenizer.json", lambda d: d["model"]["merges"].append(["a"])), "two tokens"),
}


@pytest.mark.parametrize("name", sorted({*BOTH, *OLD, *NEW}))
def test_a_checkpoint_that_does_not_fit(clip: Clip, plain_llava: Path, tmp_path: Path, name: str) -> None:
    cases = BOTH | (OLD if clip.case.old_files else NEW)
    if name not in cases:
        pytest.skip("shown by the other CLIP")
    edit, words = cases[name]
    folder = tmp_path / "clip"
    shutil.copytree(clip.folder, folder)
    edit(folder)
    with pytest.raises(ConvertError, match=words) as caught:
        qap.convert(plain_llava, tmp_path / "out", quantize="F32", clip_text=folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("clip_text: ")
    assert not (tmp_path / "out").exists()


def test_no_folder(plain_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="checkpoint folder"):
        qap.convert(plain_llava, tmp_path / "out", clip_text=tmp_path / "none")


def test_a_siglip_tower_has_no_text_tower_of_clip(make_llava: Any, clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="CLIP tower"):
        qap.convert(make_llava(siglip=True), tmp_path / "out", clip_text=clip.folder)


def test_old_config_dicts_replace_the_sections(clip: Clip) -> None:
    from qap_gguf.convert.llava.clip_text import _parse

    data = json.loads((clip.folder / "config.json").read_text(encoding="utf-8"))
    text = dict(data["text_config"])
    text.pop("eos_token_id")
    spec = _parse(data | {"text_config_dict": text})
    assert spec.eos == 49407  # transformers' default, whatever text_config says
    assert spec.n_embd == clip.case.n_embd
