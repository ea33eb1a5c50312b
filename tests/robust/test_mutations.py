"""The gate in front of native loading: damaged model files never end the process (tools/fuzz/mutate.py, a bounded run).

Each mutation runs in a process of its own. Without the gate (native/src/gate) a tenth of these files abort.
"""

from __future__ import annotations

import collections
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from gguf_mutations import KINDS, Gguf, write
from mutate import outcomes, use_tiles, with_axes
from qap_gguf.files.gguf import check_mmproj
from tiny_mmproj import PROJECTORS, tiny_mmproj

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has loaded ggml")


def test_200_mutations_of_the_packaged_pair(tmp_path: Path) -> None:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for case, outcome, said in outcomes(list(range(12 * len(KINDS))), seed=1, jobs=2, folder=tmp_path):
        found[outcome].append(f"{case}: {said[-500:]}")
    assert set(found) <= {"ran", "refused"}, {name: found[name] for name in found if name not in ("ran", "refused")}
    assert sum(map(len, found.values())) >= 200
    assert len(found["refused"]) > 100
    assert len(found["ran"]) > 20  # bytes of weights and harmless keys


def test_mutations_of_the_other_projectors(tmp_path: Path) -> None:
    """One round of each kind for every projector that the gate has complete rules for, each encodes all tiles."""
    numbers = list(range(5 * len(KINDS), 10 * len(KINDS)))
    found: dict[str, list[str]] = collections.defaultdict(list)
    for case, outcome, said in outcomes(numbers, seed=2, jobs=2, folder=tmp_path, projectors=True):
        found[outcome].append(f"{case}: {said[-500:]}")
    assert set(found) == {"ran", "refused"}, {name: found[name] for name in found if name not in ("ran", "refused")}


@pytest.mark.parametrize("projector", PROJECTORS)
def test_the_undamaged_files_run(projector: str, tmp_path: Path, packaged: qap.PackagedModel) -> None:
    path = tmp_path / f"{projector}.gguf"
    path.write_bytes(tiny_mmproj(projector))
    assert check_mmproj(path) == 256
    model = packaged.model if projector != "hunyuanvl" else with_axes(packaged.model, tmp_path / "model.gguf")
    use_tiles(path, model)


def test_taking_apart_and_putting_together_changes_nothing(packaged: qap.PackagedModel) -> None:
    for path in (packaged.mmproj, packaged.model):
        file = Gguf(path.read_bytes())
        assert write(file.keys, file.tensors) == path.read_bytes()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_mutations_are_seeded_and_change_the_file(packaged: qap.PackagedModel, kind: object) -> None:
    assert callable(kind)
    file = Gguf(packaged.mmproj.read_bytes())
    made = [kind(random.Random(number), file) for number in (1, 1, 2, 3)]
    assert made[0] == made[1]
    assert len(set(made[1:])) > 1
    assert file.whole not in made or made.count(file.whole) < len(made)
