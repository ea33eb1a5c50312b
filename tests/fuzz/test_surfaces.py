"""Our own surfaces under cases that are kept (corpus/) and a bounded number of new ones; see surfaces.py.

What tools/fuzz/fuzz_surfaces.py finds in a long run lands in corpus/ and is run here from then on.
"""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from fuzz.server_requests import Requests
from fuzz.surfaces import Arguments, Checkpoint, Metadata, Questions, SentencePiece, Surface, sentencepiece_model
from qap_gguf.convert.tokenizers.spm import from_model

CORPUS = Path(__file__).with_name("corpus")
KEPT = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*.json"))
#: new cases of each surface in a test run, and the ends that must be among them
BOUNDED: dict[str, tuple[int, set[str]]] = {
    "checkpoint": (120, {"converted", "refused"}),
    "sentencepiece": (300, {"read", "refused"}),
    "metadata": (1000, {"read", "refused", "none"}),
    "arguments": (300, {"scored and selected", "refused and refused", "scored and refused"}),
    "questions": (200, {"read", "refused"}),
    "requests": (80, {"answered", "streamed", "refused"}),
}


@pytest.fixture(scope="module")
def requests() -> Iterator[Requests]:
    """A server with the packaged model, in a process of its own."""
    from serve.conftest import FUZZED, serving

    with serving(*FUZZED) as server:
        yield Requests(*server.address, lambda: server.process.poll() is None)


@pytest.fixture(scope="module")
def surfaces() -> dict[str, Surface]:
    made: list[Surface] = [SentencePiece(), Metadata(), Arguments(), Questions()]
    return {surface.name: surface for surface in made}


def find(name: str, surfaces: dict[str, Surface], request: pytest.FixtureRequest) -> Surface:
    """The surface; that of checkpoints needs one, which needs transformers, that of requests a server."""
    if name == "checkpoint" and name not in surfaces:
        surfaces[name] = Checkpoint(request.getfixturevalue("plain_llava"))
    if name == "requests" and name not in surfaces:
        surfaces[name] = request.getfixturevalue("requests")
    return surfaces[name]


@pytest.mark.parametrize("case", KEPT)
def test_cases_that_were_kept(case: str, surfaces: dict[str, Surface], request: pytest.FixtureRequest) -> None:
    surface = find(case.partition("/")[0], surfaces, request)
    surface.run(json.loads((CORPUS / case).read_text()))


@pytest.mark.parametrize("name", BOUNDED)
def test_new_cases(name: str, surfaces: dict[str, Surface], request: pytest.FixtureRequest) -> None:
    count, ends = BOUNDED[name]
    surface = find(name, surfaces, request)
    found: collections.Counter[str] = collections.Counter()
    for number in range(count):
        case = surface.make(random.Random(f"{name}/{number}"))
        try:
            found[surface.run(case)] += 1
        except Exception as err:
            raise AssertionError(f"{name} {number}: {json.dumps(case)[:2000]}") from err
    assert ends <= set(found), found


def test_a_case_that_breaks_a_promise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surfaces can fail: here selection answers one index too few."""
    import qap_gguf as qap

    real = qap.select
    monkeypatch.setattr(qap, "select", lambda *args, **settings: real(*args, **settings)[:-1])
    surface = Arguments()

    def run() -> None:
        for number in range(100):
            surface.run(surface.make(random.Random(number)))

    with pytest.raises(AssertionError, match="ascending indices"):
        run()


def test_the_undamaged_tokenizer_model_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    assert from_model(path).tokens[-1] == "\u2581ab"
