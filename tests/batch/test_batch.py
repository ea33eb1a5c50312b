"""`qap.batch`: any rows, in the order of their ends; every row once, damaged ones too."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qap_gguf as qap
from batch.conftest import SMALL
from qap_gguf.batch import BatchModel, BatchResult
from qap_gguf.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("program")
SAMPLE = qap.packaged_model().sample


@pytest.fixture(scope="module")
def model() -> Iterator[BatchModel]:
    with BatchModel(**SMALL) as opened:
        yield opened


def by_id(results: Iterator[BatchResult]) -> dict[str, BatchResult]:
    found = list(results)
    rows = {result.id: result for result in found}
    assert len(rows) == len(found)
    return rows


def test_pictures_of_any_kind(model: BatchModel) -> None:
    uri = "data:image/png;base64," + base64.b64encode(SAMPLE.read_bytes()).decode()
    with Image.open(SAMPLE) as image:
        array = np.asarray(image.convert("RGB"))
    kinds = [
        SAMPLE,
        str(SAMPLE),
        SAMPLE.read_bytes(),
        uri,
        array,
        Image.fromarray(array),
        {"bytes": None, "path": SAMPLE},
    ]
    found = by_id(model.run({"image": kind} for kind in kinds))
    assert [found[str(i)].answer for i in range(1, 8)] == ["house"] * 7
    assert found["1"].image == str(SAMPLE)
    assert found["3"].image is None
    assert found["4"].image == uri[:40] + "..."


def test_settings_of_a_row(model: BatchModel) -> None:
    rows: list[dict[str, Any]] = [
        {"image": SAMPLE},
        {"image": SAMPLE, "n_keep": 36},
        {"image": SAMPLE, "keep_ratio": 0.5, "select": "dpp"},
        {"image": SAMPLE, "prompt": "How many objects are there?"},
        {"image": SAMPLE, "prompt": "List the objects in row order.", "max_tokens": 3},
        {"image": [SAMPLE, SAMPLE]},
        {"image": SAMPLE, "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["cat", 7]}}}},
        {"image": SAMPLE, "stop": ["ou"]},
    ]
    found = by_id(model.run(rows))
    assert [found[str(i)].error for i in range(1, 9)] == [None] * 8
    assert [found[str(i)].kept for i in range(1, 5)] == [144, 36, 72, 144]
    assert found["1"].image_tokens == 144
    assert found["4"].answer == "four"
    assert (found["5"].tokens, found["5"].finish_reason) == (3, "length")
    assert found["6"].kept == 288
    assert json.loads(found["7"].answer or "") in ("cat", 7)
    assert found["8"].answer == "h"
    assert found["1"].prompt_tokens > 144
    assert found["1"].response is not None
    assert found["1"].response["prune"]["images"][0]["n_kept"] == 144
    assert max(result.prefill_s for result in found.values()) > 0
    assert max(result.encode_s for result in found.values()) > 0


def test_rows_that_cannot_be_answered(model: BatchModel, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(SAMPLE.read_bytes()[:500])
    rows: list[dict[str, Any]] = [
        {"image": tmp_path / "bad.png"},
        {"image": "none.png"},
        {"image": SAMPLE, "n_keep": 0},
        {"image": SAMPLE, "semantic": "text"},
        {"image": SAMPLE, "temperature": -1},
        {"image": SAMPLE, "prompt": "word " * 1000},
        {"image": [SAMPLE] * 4},
        {"image": "data:,x", "nonsense": 1},
        {"image": "https" + "://example/a.png"},
        {"image": SAMPLE, "prompt": "\ud800"},
        {"image": SAMPLE, "grammar": "root ::= ("},
        {"image": SAMPLE},
    ]
    found = by_id(model.run(rows))
    whys = [found[str(i)].error for i in range(1, 13)]
    for why, words in zip(
        whys,
        [
            "image:", "none at 'none.png'", "n_keep must be an integer", "looks at the prompt", "temperature: expected",
            "n_ctx", "n_ctx", "expected known keys", "URLs are not fetched", "lone surrogate", "grammar",
        ],
        strict=False,
    ):  # fmt: skip
        assert why is not None
        assert words in why
        assert "\n" not in why
    assert whys[-1] is None


def test_rows_of_openai(model: BatchModel) -> None:
    uri = "data:image/png;base64," + base64.b64encode(SAMPLE.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": SMALL["prompt"]}]
    body = {"model": "any", "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 4}
    rows = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "prune": {"n_keep": 18}}},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "A", "max_tokens": 2}},
        {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}},
    ]
    found = {name: result.to_openai() for name, result in by_id(model.run(rows)).items()}
    answer = found["a"]["response"]["body"]
    assert (answer["object"], answer["choices"][0]["message"]["content"]) == ("chat.completion", "house")
    assert answer["usage"]["prompt_tokens"] - found["b"]["response"]["body"]["usage"]["prompt_tokens"] == 126
    assert found["c"]["response"]["body"]["object"] == "text_completion"
    assert found["d"]["response"]["status_code"] == 400
    assert "expected a list" in found["d"]["response"]["body"]["error"]["message"]


def test_rows_are_read_as_they_are_needed(model: BatchModel) -> None:
    """No more than what is in the queues; leaving early ends the reading."""
    read = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(10_000):
            read.append(number)
            yield {"id": number, "image": SAMPLE}

    results = model.run(rows())
    first = next(results)
    assert first.answer == "house"
    results.close()  # type: ignore[attr-defined]
    n = len(read)
    assert n < 60
    assert by_id(model.run([{"image": SAMPLE}]))["1"].answer == "house"
    assert len(read) <= n + 2


def test_known_rows_are_passed_over(model: BatchModel) -> None:
    rows = [{"id": i, "image": SAMPLE} for i in range(4)]
    assert set(by_id(model.run(rows, known={"1", "3"}))) == {"0", "2"}


def test_two_rows_of_one_id(model: BatchModel) -> None:
    with pytest.raises(ConfigError, match="'a' again in row 2"):
        list(model.run([{"id": "a", "image": SAMPLE}, {"id": "a", "image": SAMPLE}]))


def test_rows_that_raise(model: BatchModel) -> None:
    def rows() -> Iterator[Any]:
        yield {"image": SAMPLE}
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        list(model.run(rows()))


def test_a_folder_of_python(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(SAMPLE.read_bytes())
    (result,) = qap.batch(tmp_path, **SMALL)
    assert (result.id, result.answer) == ("a.png", "house")
    with pytest.raises(DataError, match="expected pictures, found none"):
        list(qap.batch(tmp_path / "*.jpg", **SMALL))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"parallel": 0}, "parallel: expected an integer from 1 to 64"),
        ({"parallel": "many"}, "parallel: expected"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"model": "a.gguf"}, "both files of a pair"),
        ({"prune": 3}, "PruneConfig"),
        ({"prune": qap.PruneConfig(semantic="text")}, "looks at the prompt"),
        ({"kv": "q3"}, "kv: expected one of"),
        ({"chat_format": "none"}, "chat_format: expected one of"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        BatchModel(**(SMALL | wrong))
