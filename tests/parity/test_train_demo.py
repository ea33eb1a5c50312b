"""Training of the demo model: questions side by side are questions asked alone, runs stop and go on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image

import demo_questions as dq
import emoji_scenes as es
import emoji_scenes_hard as hard
from qap_gguf import reference

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")
demo_lessons: Any = pytest.importorskip("demo_lessons")
demo_pictures: Any = pytest.importorskip("demo_pictures")
straight_through: Any = pytest.importorskip("straight_through")
demo_run: Any = pytest.importorskip("demo_run")
tdm: Any = pytest.importorskip("train_demo_model")

pytestmark = pytest.mark.parity


def block(emoji: str, pixels: int) -> Image.Image:
    """A sprite that needs no font."""
    return Image.new("RGBA", (pixels, pixels), (es.EMOJI.index(emoji) * 3, 0, 255, 255))


@pytest.fixture(scope="module")
def checkpoint(make_llava: Callable[..., Path]) -> Path:
    vision = {"image_size": 192, "patch_size": 16, "num_hidden_layers": 6}
    text = {"max_position_embeddings": 1024, "num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 16}
    folder = make_llava(vision=vision, text=text)
    for name in demo_run._COPIED:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    return folder


@pytest.fixture
def learner(checkpoint: Path) -> Any:
    torch.manual_seed(0)
    return tdm.Learner(checkpoint)


def scenes_and_questions(n: int = 2, q: int = 5) -> tuple[list[es.Scene], list[list[dq.Asked]]]:
    rng = random.Random(5)
    scenes = [es.make_scene(rng, block) for _ in range(n)]
    return scenes, [dq.ask_some(rng, scene, q, {}) for scene in scenes]


def whole_lesson(learner: Any, scenes: list[es.Scene], asked: list[list[dq.Asked]], tally: Any) -> Any:
    """All lessons about whole pictures."""
    sight = learner.see(scenes)
    return learner.loss(scenes, asked, learner.picture(sight, tdm.N, True), sight, tally)


def alone(learner: Any, tokens: Any, at: Any, question: es.Question) -> tuple[list[float], bool]:
    """(loss of each label, right) of one question by transformers' own forward, over the words in use only."""
    lessons, model = learner.lessons, learner.model
    asked, answer = dq.branch(lessons.tokenize, question)
    embed = model.get_input_embeddings()
    text = torch.tensor((asked + answer)[:-1])
    inputs = torch.cat([embed(lessons.before), tokens, embed(text)])[None]
    n = len(lessons.before)
    place = torch.cat([torch.arange(n), n + at, n + tdm.N + torch.arange(len(text))])[None]
    size = inputs.shape[1]
    mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
    out = model.model.language_model(inputs_embeds=inputs, position_ids=place, attention_mask=mask).last_hidden_state[0]
    logits = out[-len(answer) :] @ lessons.words.table[lessons.words.used].T
    wanted = lessons.words.targets(torch.tensor(answer))
    each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    return each.tolist(), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize(("k", "cover"), [(144, True), (20, True), (20, False)])
def test_each_question_is_as_if_it_were_asked_alone(
    learner: Any, monkeypatch: pytest.MonkeyPatch, k: int, cover: bool
) -> None:
    monkeypatch.setattr(demo_lessons, "_OTHERS", 0)
    scenes, asked = scenes_and_questions()
    with torch.no_grad():
        picture = learner.picture(learner.see(scenes), k, cover)
        each, right, _ = learner.lessons.answers(picture, dq.pack(learner.lessons.tokenize, asked))
        one = [
            alone(learner, picture.tokens[i], picture.at[i], lesson.question)
            for i, scene in enumerate(asked)
            for lesson in scene
        ]
    np.testing.assert_allclose(each.numpy(), np.concatenate([losses for losses, _ in one]), rtol=2e-4, atol=2e-5)
    assert right.flatten().tolist() == [good for _, good in one]


def test_image_tokens_are_those_of_transformers(learner: Any) -> None:
    scenes, _ = scenes_and_questions()
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (tdm.MEAN, tdm.DEVIATION))
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        mine = learner.see(scenes).tokens
        theirs = learner.model.model.get_image_features((pixels - mean) / deviation)
    theirs = getattr(theirs, "pooler_output", theirs)
    theirs = torch.stack(list(theirs)) if isinstance(theirs, (list, tuple)) else theirs
    np.testing.assert_allclose(mine.numpy(), theirs.reshape(mine.shape).numpy(), rtol=1e-4, atol=1e-5)


def test_what_the_class_token_looks_at_is_what_transformers_says(learner: Any) -> None:
    scenes, _ = scenes_and_questions()
    learner.model.set_attn_implementation("eager")
    pixels = demo_lessons.pixel_values(scenes, tdm.MEAN, tdm.DEVIATION)
    with torch.no_grad():
        mine = learner.see(scenes).attention
        theirs = learner.tower(pixels, output_attentions=True).attentions[tdm.LAYERS - 1].mean(1)[:, 0, 1:]
    np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("d", "k"), [(256, 18), (256, 1), (200, 40), (64, 72)])
def test_tokens_that_cover_are_those_that_the_package_keeps(d: int, k: int) -> None:
    rng = np.random.default_rng(d + k)
    tokens = rng.standard_normal((2, 72, d)).astype(np.float32) * rng.uniform(0.1, 3, (2, 72, 1)).astype(np.float32)
    attention = rng.random((2, 72)).astype(np.float32)
    sight = demo_pictures.Sight(torch.from_numpy(tokens), torch.from_numpy(attention))
    scores, kept = demo_pictures.total_score(sight).numpy(), demo_pictures.covering(sight, k).numpy()
    for i in range(2):
        want = reference.score(tokens[i], semantic=attention[i]).total
        np.testing.assert_allclose(scores[i], want, atol=1e-5)
        np.testing.assert_array_equal(kept[i], reference.select(want, k, "coverage", features=tokens[i]))


def test_scores_are_spread_by_chance_only_where_it_is_said() -> None:
    torch.manual_seed(1)
    sight = demo_pictures.Sight(torch.randn(1, 144, 256), torch.rand(1, 144))
    same = {tuple(demo_pictures.covering(sight, 18)[0].tolist()) for _ in range(4)}
    spread = {tuple(demo_pictures.covering(sight, 18, spread=True)[0].tolist()) for _ in range(4)}
    assert len(same) == 1
    assert len(spread) > 1


def test_patches_of_one_thing_are_alike_or_apart() -> None:
    labels = torch.zeros(1, tdm.N, dtype=torch.long)
    labels[0, [0, 1, 2, 12, 9, 10]] = torch.tensor([5, 5, 5, 5, 8, 8])  # in the first and in the last cell of a row
    tokens = torch.zeros(1, tdm.N, 4)
    tokens[0, :, 0] = 1
    tokens[0, [0, 1, 2, 12, 9, 10]] = torch.tensor([0.0, 3.0, 0.0, 0.0])
    assert [float(x) for x in demo_pictures.apart(tokens, labels, demo_lessons.cells_of(tdm.SIDE))] == pytest.approx(
        [0, 0], abs=1e-6
    )
    tokens[0, [0, 1]] = torch.tensor([0.0, 0.0, 2.0, 0.0])  # half of the first object looks in another direction
    assert float(demo_pictures.apart(tokens, labels, demo_lessons.cells_of(tdm.SIDE))[1]) == pytest.approx(
        0.25
    )  # mean of 1 - (1/4 + 1/4) and 0


def test_padding_is_not_looked_at_as_a_token(learner: Any) -> None:
    scene = hard.make_wide(random.Random(3), block)
    shown = tdm.shown_of([scene])
    whole = demo_pictures.padded(scene)
    assert whole.pixels.shape == (es.SIZE, es.SIZE, 3)
    np.testing.assert_array_equal(whole.pixels[48:144], scene.pixels)
    assert not demo_pictures.patch_labels(scene)[np.setdiff1d(np.arange(tdm.N), shown.numpy())].any()
    sight = learner.see([scene])
    assert learner.picture(sight, tdm.N, True, shown).at.tolist() == [shown.tolist()]
    assert set(learner.picture(sight, 9, True, shown).at[0].tolist()) < set(shown.tolist())
    asked = [dq.ask_some(random.Random(1), scene, 4, {})]
    assert torch.isfinite(
        learner.loss([scene], asked, learner.picture(sight, 9, True, shown), sight, demo_lessons.Tally())
    )


def test_rounded_weights_are_ggmls_and_still_learn() -> None:
    weight = torch.randn(6, 64) * torch.tensor([1.0, 1e-3, 30.0, 0.0, 1.0, 1.0])[:, None]
    packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    want = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(straight_through.q4_0(weight).numpy(), want)
    linear = torch.nn.Linear(64, 6, bias=False)
    linear.weight.data = weight.clone()
    straight_through.round_as_it_learns(linear)
    x = torch.randn(3, 64)
    np.testing.assert_allclose(linear(x).detach().numpy(), x.numpy() @ want.T, rtol=1e-5, atol=1e-5)
    linear(x).sum().backward()
    np.testing.assert_allclose(linear.weight.grad.numpy(), np.tile(x.sum(0).numpy(), (6, 1)), rtol=1e-5)


def test_labels_are_the_answer_and_its_end_in_the_last_columns(checkpoint: Path) -> None:
    tokenize = demo_lessons.tokenizer_of(checkpoint)
    one = dq.Asked(es.Question("Where is the dog?", "row 1, column 2", "where"), "\nWhere is the dog", (1,))
    packed = dq.pack(tokenize, [[one, dq.Asked(es.Question("What?", "dog", "at"))]])
    for q, answer in enumerate(("row 1, column 2<|im_end|>", "dog<|im_end|>")):
        learnt = packed.labels[0, q][packed.labels[0, q] != dq.IGNORED].tolist()
        assert learnt == tokenize(answer) == packed.labels[0, q, -len(learnt) :].tolist()
        assert packed.tokens[0, q, -len(learnt) + 1 :].tolist() == learnt[:-1]  # each label is the next token
        real = packed.real[0, q]
        assert packed.position[0, q][real].tolist() == list(range(real.sum()))
        assert real.tolist() == sorted(real.tolist())  # padding comes first
    assert packed.name[0, 1] == -1
    assert packed.tokens[0, 0, packed.name[0, 0]] == tokenize("\nWhere is the dog")[-1]


def test_lessons_of_a_search_that_was_right_cost_nothing(learner: Any) -> None:
    """Attention that looks where it should, and readers that read what is there, leave no loss."""
    scenes, asked = scenes_and_questions(q=12)
    packed = dq.pack(learner.lessons.tokenize, asked)
    picture = learner.picture(learner.see(scenes), tdm.N, True)
    _, _, seen = learner.lessons.answers(picture, packed)
    n_before = len(learner.lessons.before)
    for i, scene in enumerate(asked):
        for j, one in enumerate(scene):
            if not one.to_name:
                continue
            name = int(packed.name[i, j])
            search, carry = seen.logits[1].detach(), seen.logits[2].detach()
            search[i, j, name] = -50.0
            if one.cells:
                search[i, j, name, n_before : n_before + tdm.N][torch.isin(learner.cells, torch.tensor(one.cells))] = (
                    50.0
                )
            else:
                search[i, j, name, 0] = 50.0
            carry[i, j] = -50.0
            carry[i, j, :, n_before + tdm.N + name] = 50.0
            seen.logits[1], seen.logits[2] = search, carry
    losses = learner.lessons._search(picture, asked, packed, seen)
    assert float(losses["search"]) == pytest.approx(0, abs=1e-5)
    assert float(losses["carry"]) == pytest.approx(0, abs=1e-5)
    seen.logits[1][:] = seen.logits[1].flip(-1)
    assert float(learner.lessons._search(picture, asked, packed, seen)["search"]) > 10


@pytest.mark.parametrize("k", [1, 9, 72, 144])
@pytest.mark.parametrize("cover", [True, False])
def test_kept_patches_are_in_order_and_once_each(learner: Any, k: int, cover: bool) -> None:
    tokens = torch.randn(3, tdm.N, 8)
    picture = learner.picture(demo_pictures.Sight(tokens, torch.rand(3, tdm.N)), k, cover)
    for i, row in enumerate(picture.at.tolist()):
        assert row == sorted(set(row))
        assert len(row) == k
        assert torch.equal(picture.tokens[i], tokens[i, row])


def test_patches_are_labelled_by_what_they_show() -> None:
    scene = scenes_and_questions(1)[0][0]
    labels = demo_pictures.patch_labels(scene)
    cells = demo_lessons.cells_of(tdm.SIDE).numpy()
    for placed in scene.objects:
        inside = labels[cells == placed.row * es.GRID + placed.column]
        assert set(inside) <= {0, es.EMOJI.index(placed.emoji) + 1}
        assert (inside > 0).sum() >= 4  # an object of 32 pixels is two patches wide
    full = {placed.row * es.GRID + placed.column for placed in scene.objects}
    assert not labels[~np.isin(cells, list(full))].any()


def test_training_learns_stops_and_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tdm, "find_font", lambda given: given)
    monkeypatch.setattr(tdm, "font_sprites", lambda font: block)
    out = tmp_path / "out"
    words = ["--init", str(checkpoint), "--out", str(out), "--batch", "2", "--questions", "6", "--rounded"]
    words += ["--bf16", "--export", str(tmp_path / "part.safetensors")]
    parser = tdm.parser()
    assert demo_run.main("t", tdm.train, parser.parse_args([*words, "--steps", "2"])) == 0
    assert "step 2: held out, K = 144: all " in capsys.readouterr().out
    first = torch.load(out / demo_run.STATE)["weights"]
    assert demo_run.main("t", tdm.train, parser.parse_args([*words, "--steps", "3"])) == 0
    assert "going on at step 2" in capsys.readouterr().err
    second = torch.load(out / demo_run.STATE)
    assert second["step"] == 3
    assert any(not torch.equal(first[name], second["weights"][name]) for name in first)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "part.safetensors"}
    import qap_gguf as qap

    assert qap.convert(out, tmp_path / "gguf", quantize="F16").model.is_file()


def test_a_signal_stops_and_saves(checkpoint: Path, tmp_path: Path, learner: Any) -> None:
    import os
    import signal

    run = demo_run.Run(learner.model, learner.lessons, checkpoint, tmp_path / "out", 1e-3)
    scenes, asked = scenes_and_questions()

    def lesson() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole_lesson(learner, scenes, asked, run.tally)

    before = signal.getsignal(signal.SIGTERM)
    run.go(lesson, lambda: "", 1000, 60)
    assert run.step == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(tmp_path / "out" / demo_run.STATE)["step"] == 1


def test_lessons_are_learnt(learner: Any, checkpoint: Path, tmp_path: Path) -> None:
    """The same two scenes 30 times: every lesson costs less in the end."""
    run = demo_run.Run(learner.model, learner.lessons, checkpoint, tmp_path / "out", 2e-3)
    scenes, asked = scenes_and_questions(q=8)
    losses: list[dict[str, float]] = []

    def lesson() -> Any:
        loss = whole_lesson(learner, scenes, asked, run.tally)
        losses.append({name: some[-1] for name, some in run.tally.losses.items()})
        return loss

    run.go(lesson, lambda: "", 30, 60)
    taught = {"answers", "search", "carry", "found", "inside", "what", "looks", "alike"}
    assert set(losses[0]) == taught | {"places"}  # which weighs nothing here
    assert all(losses[-1][name] < losses[0][name] for name in taught), (losses[0], losses[-1])


def test_what_cannot_be_trained_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    parse = tdm.parser().parse_args
    assert demo_run.main("t", tdm.train, parse(["--init", str(tmp_path), "--out", str(tmp_path / "o")])) == 1
    assert demo_run.main("t", tdm.train, parse(["--init", str(checkpoint), "--out", str(tmp_path / "mine")])) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "choose another --out" in said[1]
    assert demo_lessons.rate_at(0, 0, 1.0) < demo_lessons.rate_at(0.5, 200, 1.0) > demo_lessons.rate_at(0.99, 999, 1.0)
