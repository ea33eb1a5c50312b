"""Every example in a docstring of the package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import qap_gguf
from qap_gguf.errors import ConfigError
from qap_gguf.serve.child import find_program

MODULES = ["qap_gguf"] + [
    module.name
    for module in pkgutil.walk_packages(qap_gguf.__path__, "qap_gguf.")
    if module.name not in ("qap_gguf._core", "qap_gguf.__main__")
]
NEEDS = {"qap_gguf.eval.lmms": "lmms_eval"}
PROGRAM = ("qap_gguf.batch.api", "qap_gguf.ray")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} is a plug-in for it")
    if name in PROGRAM:
        try:
            find_program()
        except ConfigError as err:
            pytest.skip(str(err))
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
