"""Names of the parts of split models: one rule for files here, far ones and repositories."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from qap_gguf.files.far import part_urls
from qap_gguf.files.gguf import model_parts
from qap_gguf.files.hub import choose
from qap_gguf.files.parts import PartName, part_names, part_of

ALONE = ["a.gguf", "a-1-of-2.gguf", "a-00002-of-00003.gguf", "a-00001-of-00001.gguf", "a-00001-of-00513.gguf"]
ALONE += ["a-00000-of-00002.gguf", "a-00001-of-00002.gguf\n", "a-00001-of-00002.bin"]


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_first_part_stands_alone(name: str) -> None:
    assert part_names(name) == [name]
    assert model_parts(Path("x") / name) == [Path("x") / name]


@pytest.mark.parametrize("suffix", ["gguf", "GGUF"])
def test_all_parts_have_the_suffix_of_the_first(suffix: str) -> None:
    names = [f"a-0000{i}-of-00003.{suffix}" for i in (1, 2, 3)]
    assert part_names(names[0]) == names
    assert model_parts(Path("x") / names[0]) == [Path("x") / name for name in names]
    assert part_urls(f"https://example/{names[0]}") == [f"https://example/{name}" for name in names]
    assert [part_of(name) for name in names] == [PartName("a", i, 3) for i in (1, 2, 3)]


def test_parts_of_another_model_are_not_taken_for_its_own() -> None:
    own = [f"a-0000{i}-of-00002.gguf" for i in (1, 2)]
    others = ["a-0.5b-00001-of-00002.gguf", "a-0.5b-00002-of-00002.gguf", "a-00001-of-00003.gguf"]
    found, _ = choose([*others, *own, "mmproj-f16.gguf"], filename=own[0])
    assert found == own
