"""llama-server prunes: by its environment, by each request, and never by what another request asked for."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qap_gguf as qap
import server_answers
from dropin.gguf_copy import rewrite
from programs.conftest import PICTURE, Server, program, running

QUESTION = "What is in row 2, column 4?"
DENSE, TEXT = 144, 20  # tokens of the picture, and of the prompt around it

#: What a request says, and how many of its tokens are the picture's then.
SETTINGS: list[tuple[dict[str, Any], int]] = [
    ({}, DENSE),
    ({"prune": False}, DENSE),
    ({"prune": None}, DENSE),
    ({"prune": {"n_keep": 18}}, 18),
    ({"prune": {"n_keep": 18, "select": "topk"}}, 18),
    ({"prune": {"n_keep": 18, "select": "uniform"}}, 18),
    ({"prune": {"n_keep": 18, "select": "random", "seed": 7}}, 18),
    ({"prune": {"n_keep": 18, "alpha": 0.0}}, 18),
    ({"prune": {"n_keep": 18, "alpha": "dynamic", "select": "topk"}}, 18),
    ({"prune": {"keep_ratio": 0.25}}, 36),
    ({"prune": {"n_keep": 18, "encoder_keep": 0.5}}, 18),
    ({"prune": {"n_keep": 18, "encoder_keep": 0.5, "encoder_layer": 1}}, 18),
    ({"prune": {"n_keep": 18, "encoder_keep": 0.125}}, 18),
    ({"prune": {"n_keep": 72, "encoder_keep": 0.125}}, 18),
    ({"prune": {"n_keep": 72, "duplicates": 16}}, 35),
    ({"prune": {"n_keep": 18, "duplicates": 16, "skip_flat_tiles": 3}}, 18),
    ({"prune": {"n_keep": 18, "duplicates": "off"}}, 18),
]

#: What a request may get wrong, and what the answer says of it.
WRONG: list[tuple[Any, str]] = [
    (5, "expected an object"),
    ({"n_keep": 0}, "n_keep: expected a whole number from 1, got '0'"),
    ({"n_keep": -3}, "n_keep: expected a whole number from 1, got '-3'"),
    ({"n_keep": [1]}, "n_keep: expected a whole number from 1, got '[1]'"),
    ({"keep_ratio": 1.5}, "keep_ratio: expected a number in (0, 1], got '1.5'"),
    ({"alpha": "much"}, "alpha: expected a number in [0, 1], got 'much'"),
    ({"encoder_keep": 0}, "encoder_keep: expected a number in (0, 1], got '0'"),
    ({"encoder_layer": 0}, "encoder_layer: expected a whole number from 1, got '0'"),
    ({"encoder_keep": 0.5, "encoder_layer": 99}, "encoder_layer: expected a number in 1.."),
    ({"duplicates": 256}, "duplicates: expected a whole number in 0..255, or off, got '256'"),
    ({"duplicates": 3, "encoder_keep": 0.5}, "duplicates: expected encoder_keep 1 beside it, got 0.5"),
    ({"select": "best"}, "select: expected one of its names"),
    ({"keep": 18}, "unknown setting 'keep'"),
    ({"semantic": "text"}, "looks at the prompt"),
    ({"alpha": 1, "semantic": "none"}, "alpha: 1 leaves nothing to rank by"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running(tmp_path_factory.mktemp("server"), "--parallel", "2") as found:
        yield found


def answer(server: Server, question: str, settings: dict[str, Any]) -> tuple[str, int]:
    """Text of the answer, and tokens of the prompt."""
    status, found = server.ask(question, **settings)
    assert status == 200, found
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]


@pytest.mark.parametrize(("settings", "n_image"), SETTINGS)
def test_a_request_says_how_many_tokens_are_kept(server: Server, settings: dict[str, Any], n_image: int) -> None:
    assert answer(server, QUESTION, settings)[1] == n_image + TEXT


@pytest.mark.parametrize(("asked", "why"), WRONG)
def test_a_wrong_request_is_told_what_is_wrong(server: Server, asked: Any, why: str) -> None:
    status, found = server.ask(QUESTION, prune=asked)
    assert status == 400
    assert why in found["error"]["message"]
    assert answer(server, QUESTION, {"prune": {"n_keep": 18}}) == ("boat", 18 + TEXT)


def test_a_request_leaves_nothing_behind(server: Server) -> None:
    """The setting of one request holds for it alone, also where the request fails."""
    assert server.ask(QUESTION, prune={"n_keep": 18})[0] == 200
    assert server.ask(QUESTION, prune={"n_keep": 0})[0] == 400
    assert answer(server, QUESTION, {})[1] == DENSE + TEXT


def test_no_answer_comes_from_a_picture_pruned_otherwise(tmp_path: Path) -> None:
    """The prompt cache compares pictures by id and number of tokens: random requests against a server without it."""
    questions = [QUESTION, "How many objects are there?", "What is in row 1, column 2?"]
    cases = [(question, settings) for question in questions for settings, _ in SETTINGS]
    plain = {"cache_prompt": False}
    with running(tmp_path, "--parallel", "1") as fresh:
        expected = [answer(fresh, question, settings | plain) for question, settings in cases]
    assert len({text for text, _ in expected}) > 4  # the settings do make a difference
    order = random.Random(2026)
    with running(tmp_path, "--parallel", "2") as cached:
        for _ in range(120):
            i = order.randrange(len(cases))
            question, settings = cases[i]
            assert answer(cached, question, settings) == expected[i], cases[i]


@pytest.mark.parametrize(
    ("variables", "n_image"),
    [({"QAP_N_KEEP": "18"}, 18), ({"QAP_KEEP_RATIO": "0.125", "QAP_SELECT": "topk"}, 18), ({"QAP_ALPHA": "0.5"}, 36)],
)
def test_the_environment_prunes(tmp_path: Path, variables: dict[str, str], n_image: int) -> None:
    with running(tmp_path, **variables) as server:
        assert answer(server, QUESTION, {})[1] == n_image + TEXT
        assert answer(server, QUESTION, {"prune": {"n_keep": 36}})[1] == 36 + TEXT
        assert answer(server, QUESTION, {"prune": False})[1] == DENSE + TEXT


def test_the_environment_drops_early(tmp_path: Path) -> None:
    with running(tmp_path, QAP_N_KEEP="99", QAP_ENCODER_KEEP="0.2", QAP_ENCODER_LAYER="2") as server:
        assert answer(server, QUESTION, {})[1] == 29 + TEXT  # what is left
        assert answer(server, QUESTION, {"prune": {"encoder_keep": 1}})[1] == 99 + TEXT
        assert answer(server, QUESTION, {"prune": False})[1] == DENSE + TEXT
    with running(tmp_path, QAP_ENCODER_KEEP="2") as server:
        status, found = server.ask(QUESTION)
        assert status == 400
        assert "QAP_ENCODER_KEEP: expected a number in (0, 1], got '2'" in found["error"]["message"]


def test_tiles_of_which_nothing_is_kept(tmp_path: Path) -> None:
    """Four tiles, two of them blank, and an overview: fewer tokens than tiles, and nothing of the blank ones."""
    keys: dict[str, Any] = {
        "clip.vision.mm_patch_merge_type": "spatial_unpad",
        "clip.vision.image_grid_pinpoints": [384, 384],
    }
    mmproj = rewrite(qap.packaged_model().mmproj, tmp_path / "mmproj.gguf", keys)
    pixels = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    pixels[:, :192] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    cases: list[tuple[dict[str, Any], int]] = [
        ({"n_keep": 2}, 2),
        ({"keep_ratio": 1}, 5 * DENSE),
        ({"keep_ratio": 1, "skip_flat_tiles": 0}, 3 * DENSE),
        ({"n_keep": 90, "skip_flat_tiles": 0}, 90),
    ]
    with running(tmp_path, "--mmproj", str(mmproj)) as server:
        for prune, n_image in cases * 2:
            asked = {"prune": {**prune, "indices": True}, "max_tokens": 2, "temperature": 0}
            status, found = server.post(
                "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **asked}
            )
            assert status == 200, found
            assert found["usage"]["prompt_tokens"] == n_image + TEXT
            assert sum(row["n_kept"] for row in found["prune"]["images"]) == n_image


def test_a_wrong_variable_is_told(tmp_path: Path) -> None:
    with running(tmp_path, QAP_N_KEEP="many") as server:
        status, found = server.ask(QUESTION)
        assert status == 400
        assert "QAP_N_KEEP: expected a whole number from 1, got 'many'" in found["error"]["message"]
    with running(tmp_path, QAP_N_KEEP="many", QAP_DISABLE="1") as server:
        assert answer(server, QUESTION, {})[1] == DENSE + TEXT


def test_pictures_side_by_side(server: Server) -> None:
    """A prompt with two pictures stays in the slot; the next one has the first picture alone, and reuses it."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
    for n in (2, 1, 2):
        content = [*[image] * n, {"type": "text", "text": QUESTION}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "id_slot": 0}
        status, found = server.post("/v1/chat/completions", body)
        assert status == 200, found
        assert found["usage"]["prompt_tokens"] >= n * DENSE
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= DENSE


def test_caches_of_several_slots_change_no_answer(capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Pictures, settings, slots that are saved and restored: the short form of what docs/robustness.md counts."""
    program("llama-server")
    monkeypatch.setattr("sys.argv", ["server_answers.py", "--n", "12", "--seed", "3"])
    assert server_answers.main() == 0
    counts = json.loads(capfd.readouterr().out)
    assert counts["differ"] == 0
    assert counts["cells_reused"] > 0
    assert counts["saved"] + counts["restored"] > 0
