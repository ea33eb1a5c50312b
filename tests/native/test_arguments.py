"""`qap.score` and `qap.select` refuse bad arguments before native code sees them, in one line that says the cure.

What would slip past Python is refused by the native code itself, which never ends the process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.config import ERRORS, MERGES, OUTLIERS, POSITIONS, SELECTORS, SEMANTICS
from qap_gguf.defaults import from_params, to_params
from qap_gguf.errors import ArrayError, ConfigError

X = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
S = np.linspace(0, 1, 6, dtype=np.float32)


def changed(array: Any, at: Any, value: float) -> Any:
    copy = array.copy()
    copy[at] = value
    return copy


def assert_one_line(error: pytest.ExceptionInfo[BaseException]) -> None:
    text = str(error.value)
    assert text.strip()
    assert "\n" not in text
    assert len(text) < 300


BAD_X = {
    "list": [[1.0, 2.0]],
    "None": None,
    "float64": X.astype(np.float64),
    "float16": X.astype(np.float16),
    "big endian": X.astype(">f4"),
    "integers": X.astype(np.int32),
    "complex": X.astype(np.complex64),
    "objects": X.astype(object),
    "one dimension": X[0],
    "three dimensions": X[None],
    "no dimension": np.float32(1).reshape(()),
    "no tokens": X[:0],
    "no channels": X[:, :0],
    "Fortran order": np.asfortranarray(X),
    "every other column": X[:, ::2],
    "backwards": X[::-1],
    "NaN": changed(X, (3, 4), np.nan),
    "infinity": changed(X, (0, 0), np.inf),
    "minus infinity": changed(X, (5, 9), -np.inf),
    "above 1e30": changed(X, (1, 1), 1.001e30),
}


@pytest.mark.parametrize("x", BAD_X.values(), ids=BAD_X.keys())
def test_bad_features(x: Any) -> None:
    with pytest.raises(ArrayError, match=r"^x: expected") as error:
        qap.score(x)
    assert_one_line(error)


BAD_SEMANTIC = {
    "list": S.tolist(),
    "float64": S.astype(np.float64),
    "column": S[:, None],
    "too short": S[:5],
    "too long": np.zeros(7, np.float32),
    "empty": S[:0],
    "strided": np.zeros(12, np.float32)[::2],
    "NaN": changed(S, 2, np.nan),
    "infinity": changed(S, 2, np.inf),
}


@pytest.mark.parametrize("semantic", BAD_SEMANTIC.values(), ids=BAD_SEMANTIC.keys())
def test_bad_relevance(semantic: Any) -> None:
    with pytest.raises(ArrayError, match=r"^semantic: expected") as error:
        qap.score(X, None, semantic)
    assert_one_line(error)


def test_1e30_itself_is_accepted() -> None:
    assert np.isfinite(qap.score(changed(X, (2, 2), 1e30)).total).all()
    assert np.isfinite(qap.score(changed(X, (2, 2), -1e30)).total).all()


@pytest.mark.parametrize("cfg", [{"alpha": 0.5}, "int4", 0.125, object()], ids=["dict", "str", "float", "object"])
def test_a_config_of_another_type(cfg: Any) -> None:
    with pytest.raises(ConfigError, match="PruneConfig") as error:
        qap.score(X, cfg)
    assert_one_line(error)


@pytest.mark.parametrize("device", ["CUDA9", "", "cpu0", "all", 3, b"CPU"])
def test_an_unknown_device(device: Any) -> None:
    with pytest.raises(ConfigError, match=r"^device: expected one of CPU") as error:
        qap.score(X, device=device)
    assert_one_line(error)


@pytest.mark.parametrize("n_threads", [0, -1, 1025, 2.0, "2", True])
def test_a_bad_number_of_threads(n_threads: Any) -> None:
    with pytest.raises(ConfigError, match=r"^n_threads: expected") as error:
        qap.score(X, n_threads=n_threads)
    assert_one_line(error)


BAD_TOTAL = {name: value for name, value in BAD_SEMANTIC.items() if not name.startswith("too ")}


@pytest.mark.parametrize("total", BAD_TOTAL.values(), ids=BAD_TOTAL.keys())
def test_select_refuses_bad_scores(total: Any) -> None:
    with pytest.raises(ArrayError, match="expected") as error:
        qap.select(total, 2)
    assert_one_line(error)


@pytest.mark.parametrize("n_keep", [0, -1, 7, 2**31, 2**70, 2.0, "2", None, True, np.float32(2)])
@pytest.mark.parametrize("method", SELECTORS)
def test_select_refuses_a_bad_k(n_keep: Any, method: str) -> None:
    with pytest.raises(ConfigError, match=r"^n_keep: expected an integer in 1\.\.6") as error:
        qap.select(S, n_keep, X, method)
    assert_one_line(error)


@pytest.mark.parametrize("method", ["", "top-k", "TOPK", "DPP", None, 0, ["topk"]])
def test_select_refuses_unknown_methods(method: Any) -> None:
    names = "topk, dpp, divprune, coverage, random, uniform"
    with pytest.raises(ConfigError, match=rf"^method: expected one of {names}") as error:
        qap.select(S, 2, method=method)
    assert_one_line(error)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, "1", None, True])
def test_select_refuses_a_bad_seed(seed: Any) -> None:
    with pytest.raises(ConfigError, match=r"^seed: expected an integer") as error:
        qap.select(S, 2, method="random", seed=seed)
    assert_one_line(error)


def test_select_refuses_features_of_another_image() -> None:
    bad: list[Any] = [X[:5], X.astype(np.float64), X[0]]
    for features in bad:
        for method in ("topk", "dpp"):
            with pytest.raises(ArrayError, match=r"^features: expected") as error:
                qap.select(S, 2, features, method)
            assert_one_line(error)


@pytest.mark.parametrize("method", ["dpp", "divprune", "coverage"])
def test_selectors_that_compare_tokens_need_usable_features(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"^features: {method} compares tokens, got None") as error:
        qap.select(S, 2, method=method)
    assert_one_line(error)
    for value in (np.nan, np.inf, -np.inf, 1.001e30):
        with pytest.raises(ArrayError, match=r"^x: expected finite features") as caught:
            qap.select(S, 2, changed(X, (3, 4), value), method)
        assert_one_line(caught)


def test_numpy_integers_are_integers() -> None:
    for kind in (np.int8, np.uint64, np.int64):
        k: Any = kind(2)
        assert qap.select(S, k, seed=k).tolist() == [4, 5]


# --- the native layer alone, as if Python had checked nothing ---


def test_native_parameters_are_checked() -> None:
    good: dict[str, Any] = {
        "keep_ratio": 0.5, "n_keep": 0, "alpha": 0.5, "alpha_dynamic": False, "error": "int4", "group_size": 128,
        "outlier": "range", "outlier_weight": 0.5, "semantic": "auto", "select": "dpp", "positions": "auto",
        "merge": "none", "seed": 0, "encoder_layer": 0, "encoder_keep": 1.0, "skip_flat_tiles": -1, "duplicates": -1,
    }  # fmt: skip
    assert _core.Params(**good).count(144) == 72
    for name, value in {
        "keep_ratio": 0.0, "n_keep": -1, "alpha": float("nan"), "error": "int9", "group_size": 0, "outlier": "peak",
        "outlier_weight": 1.5, "semantic": "texts", "select": "best", "positions": "any", "merge": "sum",
        "encoder_layer": -1, "encoder_keep": 0.0, "skip_flat_tiles": 256, "duplicates": -2,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name) as error:
            _core.Params(**{**good, name: value})
        assert_one_line(error)
    assert _core.Params(**{**good, "n_keep": 145}).count(144) == 144
    assert _core.Params(**{**good, "n_keep": 145, "encoder_keep": 0.25}).count(144) == 36
    with pytest.raises(ValueError, match="at least 1 token"):
        _core.Params(**good).count(0)
    with pytest.raises(ValueError, match="at least 1 token"):
        _core.Params(**good).count_early(0)


ALLOWED = {
    "error": ERRORS, "outlier": OUTLIERS, "semantic": SEMANTICS, "select": SELECTORS, "positions": POSITIONS,
    "merge": MERGES,
}  # fmt: skip


@pytest.mark.parametrize(("field", "name"), [(field, name) for field, names in ALLOWED.items() for name in names])
def test_every_allowed_name_goes_to_native_code_and_back(field: str, name: str) -> None:
    cfg = qap.PruneConfig(**{field: name})  # type: ignore[arg-type]
    params = to_params(cfg)
    assert params.to_dict()[field] == name
    assert from_params(params) == cfg


def test_numbers_go_to_native_code_and_back() -> None:
    for cfg in (
        qap.PruneConfig(n_keep=2**31 - 1, alpha="dynamic", group_size=2**31 - 1, outlier_weight=0.1, seed=2**64 - 1),
        qap.PruneConfig(keep_ratio=0.1, alpha=0.3, outlier_weight=1.0),
        qap.PruneConfig(keep_ratio=1e-9, alpha=0.0, outlier_weight=0.0),
    ):
        assert from_params(to_params(cfg)) == cfg


def test_native_functions_check_arrays_again() -> None:
    params = to_params(qap.PruneConfig())
    for x, semantic in ((X[0], None), (X, S[:5]), (changed(X, (0, 0), np.nan), None), (X, changed(S, 0, np.inf))):
        with pytest.raises(ValueError, match="expected") as error:
            _core.score(x, semantic, params, None, 1)
        assert_one_line(error)
    with pytest.raises(ValueError, match="device"):
        _core.score(X, None, params, "none such", 1)
    with pytest.raises(TypeError):
        _core.score(X.astype(np.float64), None, params, None, 1)
    bad: list[tuple[Any, int, int, str]] = [
        (S, 6, 7, "topk"), (S, 6, 0, "topk"), (S, 5, 2, "topk"), (None, 6, 2, "topk"), (S, 6, 2, "best"),
        (S, 6, 2, "dpp"), (changed(S, 1, np.nan), 6, 2, "topk"),
    ]  # fmt: skip
    for total, n, k, method in bad:
        with pytest.raises(ValueError, match=r"expected|unknown|needs") as error:
            _core.select(total, None, n, k, method, 0)
        assert_one_line(error)
    assert _core.select(None, None, 6, 2, "uniform", 0).tolist() == [1, 4]
    with pytest.raises(ValueError, match="unknown name"):
        _core.needs_cosines("best")
