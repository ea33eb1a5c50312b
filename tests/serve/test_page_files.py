"""The page's files without a browser: what is served, with which headers, and that none names another host."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from qap_gguf.config import PruneConfig
from qap_gguf.serve import page
from qap_gguf.serve.settings import ServeSettings
from serve.conftest import URI, Served, ask, serving
from serve.test_requests import picture

TEXTS = [path for path, kind in page.FILES.values() if kind.startswith("text/")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_the_files_are_installed_and_name_no_other_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) > 500
    assert not re.findall(r"//[\w-]+\.\w|@import|url\(|https?:|\beval\(|innerHTML|document\.write", text)
    if path.suffix == ".html":
        assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)  # the policy would refuse them
        ids = re.findall(r'\bid="([\w-]+)"', text)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'\b(?:for|aria-labelledby)="([\w-]+)"', text)) <= set(ids)


def test_every_part_that_the_scripts_name_is_there() -> None:
    html = (TEXTS[0]).read_text(encoding="utf-8")
    named = {
        name for path in TEXTS if path.suffix == ".js" for name in re.findall(r'part\("([\w-]+)"\)', path.read_text())
    }
    assert len(named) > 20
    assert named <= set(re.findall(r'\bid="([\w-]+)"', html))
    for path in TEXTS:
        for other in re.findall(r'from "\./([\w.]+)"|(?:href|src)="qap/([\w.]+)"', path.read_text()):
            assert f"/qap/{''.join(other)}" in page.FILES


def test_the_page_needs_no_key_but_its_settings_do() -> None:
    with serving("--api-key", "secret", "--n-keep", "18", "--max-megapixels", "3", "--ctx", "512") as served:
        for path, (file, kind) in page.FILES.items():
            with urllib.request.urlopen(served.url + path, timeout=30) as response:
                assert response.read() == file.read_bytes()
                assert response.headers["Content-Type"].split(";")[0] == kind
                policy = response.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
                assert "unsafe" not in policy
                assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert served.get("/qap/settings")[0] == 401
        assert served.get("/qap/../pyproject.toml")[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert served.get("/qap/other.js", key)[0] == 404
        status, told = served.get("/qap/settings", key)
        assert (status, told["n_keep"], told["max_pixels"], told["keep_ratio"]) == (200, 18, 3_000_000, None)
        assert "secret" not in str(told)


def test_settings_are_those_of_the_server() -> None:
    told = page.page_settings(ServeSettings(max_tokens=7, max_body_bytes=123), PruneConfig(keep_ratio=0.5))
    assert (told["max_tokens"], told["max_body_bytes"], told["keep_ratio"], told["select"]) == (7, 123, 0.5, "coverage")


def test_scores_are_told_where_asked_for(server: Served) -> None:
    """What the maps are made of; only the selections that look at the scores alone can be checked by them."""
    wanted = {"n_keep": 20, "select": "topk", "scores": True, "indices": True}
    status, answer = server.post(ask(URI, prune=wanted, cache_prompt=False))
    assert status == 200
    (row,) = answer["prune"]["images"]
    assert {name: len(values) for name, values in row["scores"].items()} == dict.fromkeys(
        ("error", "outlier", "semantic", "total"), 144
    )
    best = sorted(range(144), key=lambda token: -row["scores"]["total"][token])[:20]
    assert row["indices"] == sorted(best)
    assert 0 <= row["alpha"] <= 1
    assert "padding" not in row
    (row,) = server.post(ask(URI, prune={"n_keep": 20}, cache_prompt=False))[1]["prune"]["images"]
    assert not {"scores", "indices", "alpha"} & set(row)
    (row,) = server.post(ask(URI, prune=None, cache_prompt=False))[1]["prune"]["images"]
    assert row == {"n_tokens": 144, "n_kept": 144}


def test_an_answer_tells_whether_its_picture_came_from_the_cache(server: Served) -> None:
    """An encode without pruning notes no attention, so that the first pruned answer encodes once more."""
    url = picture(311, 200)

    def told(**fields: Any) -> dict[str, Any]:
        answer = server.post(ask(url, **fields, cache_prompt=False))[1]
        return dict(answer["prune"])

    asked: list[dict[str, Any]] = [{"prune": None}, {}, {"prune": {"n_keep": 9}}, {"prune": None}]
    assert [told(**fields)["n_cached"] for fields in asked] == [0, 0, 1, 1]


def test_padding_is_told(server: Served) -> None:
    """The packaged model letterboxes: of a picture twice as wide as high, the outer lines are padding."""
    wanted = {"n_keep": 20, "scores": True}
    (row,) = server.post(ask(picture(400, 200), prune=wanted, cache_prompt=False))[1]["prune"]["images"]
    assert row["padding"] == [*range(36), *range(108, 144)]
    assert not any(row["scores"]["error"][token] for token in row["padding"])
