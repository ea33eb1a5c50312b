"""The 4-bit regime of benchmarks/w4a4.py: its rounding is the paper's, and unrounded it answers as llama.cpp does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qap_gguf as qap
import qap_gguf.eval as qe
from parity.built import dino_with_a_random_tower

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")
w4a4: Any = pytest.importorskip("w4a4")

pytestmark = pytest.mark.parity
QUESTIONS = ("How many objects are there?", "What is in row 1, column 2?", "Where is the house?")


def test_rounding_makes_the_error_that_the_score_measures() -> None:
    x = np.random.default_rng(0).standard_normal((9, 300)).astype(np.float32)  # a last group of 44
    x[3] = 0
    error = np.linalg.norm(x - w4a4.round_groups(torch.from_numpy(x)).numpy(), axis=1)
    assert np.allclose(error, qap.score(x, qap.PruneConfig(error="int4", group_size=128)).error, rtol=1e-4)
    assert np.allclose(error[3], 0)


def test_layers_are_rounded_and_nothing_else() -> None:
    body = torch.nn.ModuleDict({"layers": torch.nn.Sequential(torch.nn.Linear(256, 8)), "head": torch.nn.Linear(8, 8)})
    plain = body["layers"][0]
    x = torch.randn(3, 256)
    assert w4a4.round_layers(body["layers"], activations=True) == 1
    assert isinstance(body["head"], torch.nn.Linear)
    expected = torch.nn.functional.linear(w4a4.round_groups(x), w4a4.round_groups(plain.weight), plain.bias)
    assert torch.allclose(body["layers"][0](x), expected)
    assert not torch.allclose(body["layers"][0](x), plain(x), atol=1e-3)
    groups = body["layers"][0].weight.unflatten(-1, (-1, 128))
    assert max(len(group.unique()) for group in groups.flatten(0, 1)) <= 15


@pytest.mark.parametrize("name", ["tiny-llava", "dino-vl"])
def test_unrounded_answers_are_those_of_llama_cpp(name: str, tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint = tiny_llava if name == "tiny-llava" else dino_with_a_random_tower(tmp_path / "dino-vl")
    files = qap.convert(checkpoint, tmp_path / "gguf", quantize="F32", keep_positions=True)
    sample = qap.packaged_model().sample
    compared = qe.variants(["dense", "qap", "random", "pool"], [qe.Budget(n_keep=36)])
    model = w4a4.TorchModel(checkpoint, "W32A32")
    with qap.VisionModel(files.mmproj, files.model, positions="keep", n_threads=1) as vlm:
        image = vlm.encode(sample)
        rows: dict[Any, Any] = {variant: w4a4.rows_for(vlm, image, variant) for variant in compared}
        for text in QUESTIONS:
            question = qe.Question(sample, text, "?")
            ours = qe.evaluate(vlm, [question], compared)
            theirs = w4a4.ask(model, question, rows, qe.Setup())
            assert [o.said for o in theirs] == [o.said for o in ours]
            assert [o.n_kept for o in theirs] == [image.n_tokens, 36, 36, 36]
