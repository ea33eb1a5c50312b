"""Training of the demo model: questions side by side are questions asked alone, runs stop and go on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import demo_batches as db
import emoji_scenes as es

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")
tdm: Any = pytest.importorskip("train_demo_model")

pytestmark = pytest.mark.parity


def block(emoji: str, pixels: int) -> Image.Image:
    """A sprite that needs no font."""
    return Image.new("RGBA", (pixels, pixels), (es.EMOJI.index(emoji) * 3, 0, 255, 255))


@pytest.fixture(scope="module")
def checkpoint(make_llava: Callable[..., Path]) -> Path:
    folder = make_llava(vision={"image_size": 192, "patch_size": 16}, text={"max_position_embeddings": 1024})
    for name in tdm._COPIED:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    return folder


def test_each_question_is_as_if_it_were_asked_alone(checkpoint: Path) -> None:
    tokenize = tdm.tokenizer_of(checkpoint)
    before = tokenize(db.BEFORE)
    learner = tdm.Learner(checkpoint, before).eval()
    examples = [db.make_example(random.Random(i), block, tokenize, ["plain"], 3) for i in range(2)]
    arrays = db.collate(random.Random(7), examples, 20, len(before), before[0])
    batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    losses, n_labels, n_right = [], 0, 0
    with torch.no_grad():
        loss, (right, asked) = learner(batch)
        for i, example in enumerate(examples):
            for number in range(3):
                mine = example.branch == number
                alone = {
                    "pixels": batch["pixels"][i : i + 1], "patches": batch["patches"][i : i + 1],
                    "tokens": torch.from_numpy(example.tokens[mine])[None],
                    "labels": torch.from_numpy(example.labels[mine])[None],
                }  # fmt: skip
                n = len(before) + 20 + int(mine.sum())
                alone |= {"positions": torch.arange(n)[None], "sees": torch.ones(1, n, n, dtype=torch.bool).tril()}
                one, (some, _) = learner(alone)
                count = int((example.labels[mine] != db.IGNORED).sum())
                losses.append(float(one) * count)
                n_labels, n_right = n_labels + count, n_right + int(some)
    assert float(loss) == pytest.approx(sum(losses) / n_labels, rel=1e-4)
    assert (int(right), int(asked)) == (n_right, 6)


def test_labels_are_the_answer_and_its_end(checkpoint: Path) -> None:
    tokenize = tdm.tokenizer_of(checkpoint)
    tokens, labels = db.branch_tokens(tokenize, es.Question("What?", "dog", "at"))
    learnt = [label for label in labels if label != db.IGNORED]
    assert learnt == tokenize("dog<|im_end|>")
    assert len(tokens) == len(labels)
    at = len(labels) - len(learnt)
    assert tokens[at + 1 :] == learnt[:-1]  # each label is the next token


@pytest.mark.parametrize("n_keep", [1, 3, 9, 72, 144])
def test_kept_patches_are_in_order_and_show_each_object(n_keep: int) -> None:
    rng = random.Random(3)
    example = db.make_example(rng, block, lambda text: [1] * len(text), ["plain"], 1)
    kept = db.keep_patches(rng, example, n_keep)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == n_keep
    if n_keep >= 9:
        assert all(set(patches) & set(kept.tolist()) for patches in example.patches)


def test_training_learns_stops_and_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tdm, "find_font", lambda given: given)
    monkeypatch.setattr(tdm, "font_sprites", lambda font: block)
    monkeypatch.setattr(tdm, "held_out", lambda *_: {"dense": 0.5})
    out = tmp_path / "out"
    words = ["--init", str(checkpoint), "--out", str(out), "--batch", "2", "--device", "cpu", "--kinds", "plain,small"]
    assert tdm.main([*words, "--steps", "2"]) == 0
    assert "step 2: held out, dense 50.0 %" in capsys.readouterr().out
    first = torch.load(out / tdm.STATE)["weights"]
    assert tdm.main([*words, "--steps", "3"]) == 0
    assert "going on at step 2" in capsys.readouterr().err
    second = torch.load(out / tdm.STATE)
    assert second["step"] == 3
    assert any(not torch.equal(first[name], second["weights"][name]) for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    import qap_gguf as qap

    assert qap.convert(out, tmp_path / "gguf", quantize="F16").model.is_file()


def test_what_cannot_be_trained_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    assert tdm.main(["--init", str(tmp_path), "--out", str(tmp_path / "o")]) == 1
    assert tdm.main(["--init", str(checkpoint), "--out", str(tmp_path / "mine")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "choose another --out" in said[1]
    assert tdm.rate_at(0, 1000, 1.0) < tdm.rate_at(200, 1000, 1.0) > tdm.rate_at(999, 1000, 1.0)
