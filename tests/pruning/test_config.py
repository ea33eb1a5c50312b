"""PruneConfig: what it refuses, how it counts, and that it survives dictionaries and GGUF keys."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qap_gguf import _core, config, errors
from qap_gguf.cli.common import default_of
from qap_gguf.config import METADATA_TYPES, PruneConfig
from qap_gguf.defaults import from_params
from qap_gguf.errors import ConfigError

configs = st.builds(
    PruneConfig,
    # Decimals of up to six digits: what people write and what float32 keeps.
    keep_ratio=st.integers(1, 10**6).map(lambda n: n / 10**6),
    n_keep=st.none() | st.integers(1, 2**31 - 1),
    alpha=st.just("dynamic") | st.integers(0, 10**6).map(lambda n: n / 10**6),
    error=st.sampled_from(config.ERRORS),
    group_size=st.integers(1, 2**31 - 1),
    outlier=st.sampled_from(config.OUTLIERS),
    outlier_weight=st.integers(0, 10**6).map(lambda n: n / 10**6),
    semantic=st.sampled_from(config.SEMANTICS),
    select=st.sampled_from(config.SELECTORS),
    positions=st.sampled_from(config.POSITIONS),
    merge=st.sampled_from(config.MERGES),
    encoder_keep=st.integers(1, 10**6).map(lambda n: n / 10**6),
    encoder_layer=st.none() | st.integers(1, 2**31 - 1),
    skip_flat_tiles=st.none() | st.integers(0, 255),
)


def test_defaults_are_those_of_the_paper() -> None:
    cfg = PruneConfig()
    assert (cfg.keep_ratio, cfg.n_keep, cfg.alpha, cfg.error, cfg.group_size) == (0.25, None, 0.7, "int4", 128)
    assert (cfg.outlier, cfg.outlier_weight, cfg.semantic, cfg.select) == ("range", 0.5, "auto", "coverage")
    assert (cfg.positions, cfg.merge, cfg.seed) == ("auto", "none", 0)
    assert (cfg.encoder_keep, cfg.encoder_layer, cfg.skip_flat_tiles, cfg.duplicates) == (1.0, None, None, None)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("keep_ratio", 0.0, "(0, 1]"),
        ("keep_ratio", 1.0001, "(0, 1]"),
        ("keep_ratio", -0.5, "(0, 1]"),
        ("keep_ratio", math.nan, "(0, 1]"),
        ("keep_ratio", math.inf, "(0, 1]"),
        ("keep_ratio", True, "(0, 1]"),
        ("keep_ratio", "0.5", "(0, 1]"),
        ("keep_ratio", None, "pass one of them"),
        ("n_keep", 0, "1..2147483647"),
        ("n_keep", -1, "1..2147483647"),
        ("n_keep", True, "1..2147483647"),
        ("n_keep", 18.0, "1..2147483647"),
        ("n_keep", 2**31, "1..2147483647"),
        ("alpha", math.nan, '"dynamic"'),
        ("alpha", -0.01, '"dynamic"'),
        ("alpha", 1.01, '"dynamic"'),
        ("alpha", "auto", '"dynamic"'),
        ("alpha", True, '"dynamic"'),
        ("alpha", None, '"dynamic"'),
        ("alpha", 1j, '"dynamic"'),
        ("error", "int1", "int2, int3, int4"),
        ("error", "q4_k", "q8_0, iq4_nl, q4_K, q6_K"),
        ("error", "f16", "int8, q4_0, q4_1, q5_0, q5_1, q8_0"),
        ("error", 4, "int2, int3, int4"),
        ("group_size", 0, "1..2147483647"),
        ("group_size", 128.0, "1..2147483647"),
        ("group_size", False, "1..2147483647"),
        ("outlier", "peak", "range, absmax, crest"),
        ("outlier_weight", 1.5, "[0, 1]"),
        ("outlier_weight", math.nan, "[0, 1]"),
        ("semantic", "query", "auto, clip_text, cls, text, attention, none"),
        ("semantic", None, "auto, clip_text, cls"),
        ("select", "best", "topk, dpp, divprune, coverage, random, uniform"),
        ("positions", "gaps", "auto, compact, keep"),
        ("merge", "sum", "none, average"),
        ("merge", True, "none, average"),
        ("merge", None, "none, average"),
        ("seed", -1, "0..18446744073709551615"),
        ("seed", 2**64, "0..18446744073709551615"),
        ("seed", True, "0..18446744073709551615"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_the_allowed_ones(field: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig(**{field: value})
    message = str(caught.value)
    assert field in message
    assert says in message
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, errors.QapError)


def test_numpy_scalars_are_numbers_and_numpy_bools_are_not() -> None:
    cfg = PruneConfig(n_keep=np.int64(18), alpha=np.float32(0.5), group_size=np.int32(64))  # type: ignore[arg-type]
    assert cfg == PruneConfig(n_keep=18, alpha=0.5, group_size=64)
    assert [type(v) for v in (cfg.n_keep, cfg.alpha, cfg.group_size)] == [int, float, int]
    with pytest.raises(ConfigError):
        PruneConfig(n_keep=np.True_)  # type: ignore[arg-type]


def test_it_is_frozen_and_hashable() -> None:
    cfg = PruneConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.n_keep = 3  # type: ignore[misc]
    assert len({cfg, PruneConfig(), PruneConfig(seed=1)}) == 2


@pytest.mark.parametrize(
    ("ratio", "n_tokens", "k"),
    [(0.125, 144, 18), (0.1, 10, 1), (0.07, 100, 7), (1.0, 576, 576), (1e-9, 576, 1), (1e-12, 576, 1),
     (0.11, 576, 64), (0.5, 1, 1), (0.5, 3, 2), (1 / 3, 9, 3)],
)  # fmt: skip
def test_count_of_a_ratio_is_its_ceiling_without_float_dust(ratio: float, n_tokens: int, k: int) -> None:
    assert PruneConfig(keep_ratio=ratio).count(n_tokens) == k


@given(st.integers(1, 10**4), st.integers(1, 10**4))
def test_count_is_the_exact_ceiling_for_decimals(thousandths_of_ten: int, n_tokens: int) -> None:
    exact = math.ceil(Fraction(thousandths_of_ten, 10**4) * n_tokens)
    assert PruneConfig(keep_ratio=thousandths_of_ten / 10**4).count(n_tokens) == exact


def test_defaults_and_names_are_those_of_the_native_library() -> None:
    """There is no second list: what the library says, the config and the help of the command say."""
    assert from_params(_core.default_params()) == PruneConfig()
    params = PruneConfig().to_params().to_dict()
    assert params == _core.default_params().to_dict()
    for name, value in PruneConfig().to_dict().items():
        assert name == "n_keep" or default_of(name) == f"  [default: {value}]"
    for kind, names in {"error": config.ERRORS, "semantic": config.SEMANTICS, "merge": config.MERGES}.items():
        assert _core.names(kind) == names
        assert len(names) == len(set(names)) > 1
    assert _core.names("colour") == ()
    assert set(_core.signal_order()) == set(config.SEMANTICS) - {"auto", "none"}


def test_n_keep_wins_and_a_smaller_image_keeps_all() -> None:
    cfg = PruneConfig(keep_ratio=0.5, n_keep=18)
    assert cfg.keep_ratio is None
    assert (cfg.count(144), cfg.count(18)) == (18, 18)
    assert cfg.count(17) == 17  # a fixed K meets pictures of any size
    for bad in (0, -3, True, 1.5):
        with pytest.raises(ConfigError, match="n_tokens"):
            cfg.count(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["self", "cls", "two\nlines", "n" * 9000, ""])
def test_names_that_are_no_fields(name: str) -> None:
    """They may come from a stranger's JSON."""
    for take in (PruneConfig().replace, lambda **fields: PruneConfig.from_dict(fields)):
        with pytest.raises(ConfigError, match="a prune config has the fields") as error:
            take(**{name: 1})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


def test_replace_changes_one_thing_and_checks_it() -> None:
    cfg = PruneConfig(n_keep=18, seed=3)
    assert cfg.replace(alpha="dynamic") == PruneConfig(n_keep=18, seed=3, alpha="dynamic")
    assert cfg.replace(keep_ratio=0.25) == PruneConfig(keep_ratio=0.25, seed=3)  # a new ratio is never ignored
    assert cfg.replace(keep_ratio=0.25, n_keep=4) == PruneConfig(n_keep=4, seed=3)
    with pytest.raises(ConfigError, match="got alhpa; check the spelling"):
        cfg.replace(alhpa=0.1)
    with pytest.raises(ConfigError, match="alpha must be"):
        cfg.replace(alpha=3)
    with pytest.raises(ConfigError, match="got nkeep"):
        PruneConfig.from_dict({"nkeep": 3})


@given(configs, st.integers(0, 2**64 - 1))
def test_a_config_survives_json(cfg: PruneConfig, seed: int) -> None:
    cfg = cfg.replace(seed=seed)
    assert PruneConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@example(PruneConfig(keep_ratio=0.000986, outlier_weight=0.000986))  # not its seven digits in float32: 0.0009860001
@given(configs)
def test_a_config_survives_gguf_keys_also_when_floats_are_stored_in_32_bits(cfg: PruneConfig) -> None:
    meta = cfg.to_metadata()
    assert set(meta) <= set(METADATA_TYPES)
    assert ("qap.n_keep" in meta) != ("qap.keep_ratio" in meta)
    assert ("qap.alpha" in meta) != meta["qap.alpha_dynamic"]
    stored = {k: float(np.float32(v)) if METADATA_TYPES[k] == "f32" else v for k, v in meta.items()}
    assert PruneConfig.from_metadata(stored | {"clip.vision.image_size": 192}) == cfg


def test_the_tables_of_allowed_values() -> None:
    assert (*config.INT_ERRORS, *config.GGML_ERRORS, "model") == config.ERRORS
    assert [f"int{bits}" for bits in range(2, 9)] == list(config.INT_ERRORS)
    for table, default in (
        (config.ERRORS, "int4"),
        (config.OUTLIERS, "range"),
        (config.SEMANTICS, "auto"),
        (config.SELECTORS, "coverage"),
        (config.POSITIONS, "auto"),
        (config.MERGES, "none"),
    ):
        assert len(set(table)) == len(table)
        assert default in table


@pytest.mark.parametrize("merge", config.MERGES)
def test_merge_is_stored(merge: str) -> None:
    meta = PruneConfig(merge=merge).to_metadata()
    assert meta["qap.merge"] == merge
    assert METADATA_TYPES["qap.merge"] == "string"
    found = PruneConfig.from_metadata(meta)
    assert found is not None
    assert found.merge == merge


def test_a_file_from_before_merge_merges_nothing() -> None:
    meta = PruneConfig(n_keep=3).to_metadata()
    del meta["qap.merge"]
    assert PruneConfig.from_metadata(meta) == PruneConfig(n_keep=3)


def test_the_seed_is_not_stored() -> None:
    assert PruneConfig(seed=9).to_metadata() == PruneConfig().to_metadata()


def test_metadata_of_a_file_without_qap_keys_is_no_config() -> None:
    assert PruneConfig.from_metadata({"general.name": "x"}) is None


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"qap.n_keep": 3}, "qap.version must be 1, got None"),
        ({"qap.version": 2, "qap.n_keep": 3}, "qap.version must be 1, got 2"),
        ({"qap.version": True, "qap.n_keep": 3}, "qap.version must be 1, got True"),
        ({"qap.version": 1, "qap.seed": 3}, "got qap.seed"),
        ({"qap.version": 1, "qap.tiles": 3}, "got qap.tiles"),
        ({"qap.version": 1, "qap.n_keep": 0}, "n_keep must be"),
        ({"qap.version": 1, "qap.merge": "sum"}, "merge must be one of none, average"),
        ({"qap.version": 1, "qap.merge": 1}, "merge must be one of none, average"),
        ({"qap.version": 1, "qap.alpha_dynamic": 1}, "alpha_dynamic must be a bool"),
    ],
)
def test_metadata_that_is_not_ours_is_refused(meta: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PruneConfig.from_metadata(meta)


def test_every_error_is_a_qap_error_and_the_builtin_that_callers_expect() -> None:
    values = (
        "ArrayError",
        "ConfigError",
        "ConvertError",
        "DataError",
        "ImageError",
        "ModelFileError",
        "UnsupportedError",
    )
    pairs = dict.fromkeys(values, ValueError) | {"NativeError": RuntimeError, "PinError": ImportError}
    assert {*pairs, "QapError"} == set(errors.__all__)
    for name, base in pairs.items():
        assert issubclass(getattr(errors, name), errors.QapError)
        assert issubclass(getattr(errors, name), base)


@pytest.mark.parametrize("module", [config, errors])
def test_the_examples_in_the_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
