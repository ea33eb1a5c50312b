"""llama-cpp-python's own Llava15ChatHandler prunes, unchanged, when a default is set or the mmproj carries qap.* keys.

Each test runs in fresh interpreters (children.py). The packaged model gives 144 tokens for a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf import GGUFValueType

from dropin.children import run_probe
from dropin.gguf_copy import rewrite
from qap_gguf import _core
from qap_gguf.config import PruneConfig
from qap_gguf.runtime import amx as _amx

N = 144
Probe = Callable[..., Any]


def assert_plain_error(result: dict[str, Any], *kinds: str) -> None:
    assert "error" in result, result
    assert result["error"] in kinds, result
    assert result["text"].strip()
    assert "\n" not in result["text"]


def test_a_default_saves_exactly_the_cells_of_the_dropped_tokens(plain_probe: Probe) -> None:
    dense, cut, again, none, full, too_many, after, random = plain_probe(
        "chat",
        settings=[
            {},
            {"default": {"n_keep": 18}},
            {},  # the default stays until it is changed
            {"override": None},  # `use(None)` inside set_default
            {"default": {"n_keep": N}},
            {"default": {"n_keep": N + 1}},
            {"default": None},
            {"default": {"n_keep": 37, "select": "random"}},
        ],
    )
    for result in (dense, cut, again, none, full, too_many, after, random):
        assert result["cells"][0] == result["cells"][1], "llama.n_tokens and the KV cache differ"
    cells = dense["cells"][0]
    assert cut["cells"][0] == again["cells"][0] == cells - (N - 18)
    assert random["cells"][0] == cells - (N - 37)
    assert cut["text"] == again["text"]
    assert cut["text"] != ""
    for result in (none, full, too_many, after):  # dense again, word for word
        assert result == dense


def test_what_a_default_cannot_do_is_an_exception(plain_probe: Probe) -> None:
    """Gaps in 1-D positions, and signals that look at a prompt which is not whole yet."""
    refused = [{"positions": "keep"}, {"semantic": "text"}, {"semantic": "clip_text"}]
    for result in plain_probe("chat", settings=[{"default": {"n_keep": 18, **changes}} for changes in refused]):
        assert_plain_error(result, "ValueError")


def test_dense_answers_are_those_of_the_library_without_the_encoder_fixes(plain_probe: Probe) -> None:
    """With both switches on, the handler says what it says on the stock library, in as many cells."""
    if gcc := _amx.broken_by(_core, Path(str(llama_cpp.__file__)).parent / "lib"):
        pytest.skip(f"stock llama-cpp-python, compiled by {gcc}, ends by a signal on this CPU (AMX)")
    stock = plain_probe("chat", settings=[{}], package=False)
    ours = plain_probe("chat", settings=[{}], env={"QAP_DISABLE": "1", "QAP_STOCK_ENCODER": "1"})
    assert ours == stock


def test_the_packaged_model_keeps_places_and_compact_is_what_the_plain_one_does(plain_probe: Probe) -> None:
    """The text after a pruned picture stands where it would without pruning, or where the plain model has it."""
    compact = {"n_keep": 18, "positions": "compact"}
    settings = [{}, {"default": {"n_keep": 18}}, {"default": compact}]
    dense, kept, cut = run_probe("chat", settings=settings)
    plain, _, plain_cut = plain_probe("chat", settings=settings)
    assert dense == plain
    assert cut == plain_cut
    assert cut["cells"][0] == dense["cells"][0] - (N - 18)
    assert kept["cells"] == dense["cells"]  # positions, which are no longer cells
    assert kept["text"]


def test_every_image_of_a_prompt_is_pruned(plain_probe: Probe) -> None:
    dense, cut = plain_probe("chat", settings=[{}, {"default": {"n_keep": 18}}], n_images=2)
    assert dense["cells"][0] - cut["cells"][0] == 2 * (N - 18)


def test_keys_of_the_mmproj_prune_and_a_default_wins_over_them(
    plain_probe: Probe, tmp_path: Path, packaged_mmproj: Path
) -> None:
    keys: dict[str, Any] = {"qap.version": 1, "qap.keep_ratio": 0.1, "qap.alpha": 0.4, "qap.error": "int5"}
    keyed = rewrite(packaged_mmproj, tmp_path / "keyed.gguf", keys)
    plain, default, ended, none, all_tokens = plain_probe(
        "chat",
        mmproj=keyed,
        settings=[
            {},
            {"default": {"n_keep": 30}},
            {"default": None},
            {"override": None},
            {"default": {"keep_ratio": 1.0}},
        ],
    )
    dense = none["cells"][0]
    assert plain["cells"][0] == dense - (N - 15)  # ceil(14.4): the key holds the float next to 0.1
    assert default["cells"][0] == dense - (N - 30)
    assert ended == plain
    assert all_tokens == none


def test_metadata_of_a_config_prunes_as_the_config_does(
    plain_probe: Probe, tmp_path: Path, packaged_mmproj: Path
) -> None:
    config = PruneConfig(n_keep=25, alpha="dynamic", error="int3", group_size=64, outlier_weight=0.25, semantic="none")
    keyed = rewrite(packaged_mmproj, tmp_path / "keyed.gguf", config.to_metadata())
    by_keys, by_default = plain_probe("embed", mmproj=keyed), plain_probe("embed", default=config.to_dict())
    saved = (by_keys.pop("saved"), by_default.pop("saved"))
    assert by_keys == by_default
    assert all(saved)
    assert by_keys["shape"] == [25, 256]


def test_weights_of_channels_in_a_file_are_used(plain_probe: Probe, tmp_path: Path, packaged_mmproj: Path) -> None:
    """With the chunk saved as well; without them and with too few of them nothing is encoded."""
    config = PruneConfig(n_keep=25, error="model", alpha=0.0, outlier_weight=0.0, select="topk")
    found = {}
    for name, weights in {"even": [1.0] * 256, "odd": [float(i % 32 == 0) for i in range(256)]}.items():
        keyed = rewrite(
            packaged_mmproj, tmp_path / f"{name}.gguf", config.to_metadata() | {"qap.channel_weights": weights}
        )
        found[name] = plain_probe("embed", mmproj=keyed)
    plain = plain_probe("embed", default=config.replace(error="int4").to_dict())
    assert [found[name]["flash=True"] == plain["flash=True"] for name in found] == [True, False]
    assert len({one["saved"] for one in (*found.values(), plain)}) == 3
    few = rewrite(packaged_mmproj, tmp_path / "few.gguf", config.to_metadata() | {"qap.channel_weights": [1.0, 2.0]})
    for mmproj, says in ((few, "each of the 256 channels of a token, got 2"), (packaged_mmproj, "channel weights for")):
        with pytest.raises(AssertionError, match=says):
            plain_probe("embed", mmproj=mmproj, default=config.to_dict())


def test_a_vision_model_of_a_file_with_keys_prunes_only_when_asked(tmp_path: Path, packaged_mmproj: Path) -> None:
    keyed = rewrite(packaged_mmproj, tmp_path / "keyed.gguf", {"qap.version": 1, "qap.n_keep": 10})
    results = run_probe("vision", cases=[{}, {"mmproj": keyed}, {"mmproj": keyed, "prune": {"n_keep": 20}}])
    assert results[0] == results[1]
    assert results[2]["n_tokens"] == N


BAD_KEYS: dict[str, dict[str, Any]] = {
    "alpha out of range": {"qap.alpha": 7.0},
    "alpha not a number": {"qap.alpha": float("nan")},
    "alpha of another type": {"qap.alpha": "0.7"},
    "n_keep as text": {"qap.n_keep": "18"},
    "n_keep of zero": {"qap.n_keep": 0},
    "n_keep negative": {"qap.n_keep": (-5, GGUFValueType.INT32)},
    "n_keep huge": {"qap.n_keep": 2**32 - 1},
    "keep_ratio of zero": {"qap.keep_ratio": 0.0},
    "keep_ratio above one": {"qap.keep_ratio": 1.5},
    "group size of zero": {"qap.group_size": 0},
    "unknown error": {"qap.error": "int9"},
    "unknown outlier": {"qap.outlier": "peak"},
    "unknown selector": {"qap.select": "best"},
    "error as a number": {"qap.error": 4},
    "error model without weights": {"qap.error": "model"},
    "weights as whole numbers": {"qap.channel_weights": [1, 2]},
    "weights as a number": {"qap.channel_weights": 1.0},
    "a negative weight": {"qap.channel_weights": [1.0, -1.0]},
    "weights of zero": {"qap.channel_weights": [0.0, 0.0]},
    "dynamic as a number": {"qap.alpha_dynamic": 1},
    "a level above 255": {"qap.duplicates": 256},
    "a level as text": {"qap.skip_flat_tiles": "2"},
    "a level below 0": {"qap.skip_flat_tiles": (-1, GGUFValueType.INT32)},
    "duplicates beside an early drop": {"qap.duplicates": 3, "qap.encoder_keep": 0.5},
    "version 2": {"qap.version": 2},
    "version as text": {"qap.version": "1"},
}


def test_bad_keys_are_an_exception_at_loading(tmp_path: Path, packaged_mmproj: Path) -> None:
    files = []
    for number, keys in enumerate(BAD_KEYS.values()):
        files.append(rewrite(packaged_mmproj, tmp_path / f"{number}.gguf", {"qap.version": 1, **keys}))
    results = run_probe("vision", cases=[{"mmproj": file} for file in files])
    assert len(results) == len(BAD_KEYS)
    for name, keys, result in zip(BAD_KEYS, BAD_KEYS.values(), results, strict=True):
        assert_plain_error(result, "ModelFileError")
        assert next(iter(keys)).removeprefix("qap.") in result["text"], name
    for file in (files[0], files[-2]):  # the stock handler says less, but it says it with an exception
        (result,) = run_probe("chat", mmproj=file, settings=[{}])
        assert_plain_error(result, "ValueError")


def test_keys_without_a_version_are_someone_elses(plain_probe: Probe, tmp_path: Path, packaged_mmproj: Path) -> None:
    keyed = rewrite(packaged_mmproj, tmp_path / "keyed.gguf", {"qap.n_keep": 18})
    (plain, dense) = plain_probe("chat", mmproj=keyed, settings=[{}, {"override": None}])
    assert plain == dense


@pytest.mark.parametrize("switch", ["1", "yes"])
def test_the_switch_turns_defaults_and_keys_off(
    plain_probe: Probe, tmp_path: Path, packaged_mmproj: Path, switch: str
) -> None:
    bad = rewrite(packaged_mmproj, tmp_path / "keyed.gguf", {"qap.version": 2, "qap.n_keep": 18})
    found = plain_probe("embed", mmproj=bad, default={"n_keep": 10}, env={"QAP_DISABLE": switch})
    assert found["shape"][0] == N


def test_settings_belong_to_the_process_or_to_the_thread() -> None:
    """[in the main thread, in a new thread] for each stage."""
    assert run_probe("in_threads") == {
        "plain": [N, N],
        "use": [10, N],
        "inner use": [5, N],
        "after it": [10, N],
        "default": [20, 20],
        "use(None)": [N, 20],
        "after an exception": [20, 20],
        "no default": [N, N],
    }
