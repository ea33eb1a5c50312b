"""Every example in a docstring of the package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import qap_gguf

MODULES = ["qap_gguf"] + [
    module.name
    for module in pkgutil.walk_packages(qap_gguf.__path__, "qap_gguf.")
    if module.name not in ("qap_gguf._core", "qap_gguf.__main__")
]
NEEDS = {"qap_gguf.eval.lmms": "lmms_eval"}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} is a plug-in for it")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
