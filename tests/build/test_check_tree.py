"""The house rules of tools/build/check_tree.py can fail."""

from __future__ import annotations

import pytest

from check_tree import check_imports


def wrong(name: str, text: str) -> list[str]:
    return [what for _, what in check_imports(name, text)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vision/cache.py", "from qap_gguf.pruning import score"),
        ("files/gguf.py", "def f():\n    import qap_gguf.model"),
        ("eval/grid.py", "from qap_gguf.bench import shapes"),
        ("model.py", "from qap_gguf import cli"),
        ("errors.py", "from qap_gguf.config import PruneConfig"),
    ],
)
def test_an_import_of_a_higher_room_is_found(name: str, text: str) -> None:
    assert any("imports go one way" in what for what in wrong(name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pruning/score.py", "from qap_gguf import _core\nfrom qap_gguf.vision.cache import x\nimport numpy"),
        ("cli/run.py", "from qap_gguf.cli import common\nfrom qap_gguf.serve import app"),
        ("__init__.py", "from qap_gguf.chat import ChatHandler"),
    ],
)
def test_an_import_of_a_lower_room_is_none(name: str, text: str) -> None:
    assert wrong(name, text) == []


def test_a_new_room_must_be_put_in_order() -> None:
    assert "expected a room of ROOMS" in wrong("attic/box.py", "")[0]


def test_the_reference_imports_numpy_only() -> None:
    assert "NumPy only" in wrong("reference/scores.py", "import scipy")[0]
