"""The page at /qap in headless Chromium: the packaged picture, both answers, K moved, maps, a phone, a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serve.browser import Tab, browsing, find_chromium
from serve.conftest import SAMPLE, Served, serving

QUESTION = "What is in row 2, column 4?"
#: The RGBA in the middle of each of the canvas' 12 x 12 patches, as texts.
MIDDLES = """(() => {
  const canvas = document.getElementById("overlay"), n = 12, found = [];
  const copy = new OffscreenCanvas(canvas.width, canvas.height);
  const pen = copy.getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  const middle = (i, side) => Math.floor(((i + 0.5) / n) * side);
  for (let i = 0; i < n * n; i++) {
    const [x, y] = [middle(i % n, canvas.width), middle(Math.floor(i / n), canvas.height)];
    found.push(pen.getImageData(x, y, 1, 1).data.join());
  }
  return found;
})()"""
#: The right edges of all that can be seen.
EDGES = """[document.documentElement.scrollWidth,
  ...[...document.querySelectorAll("main *, header *")].map((e) => e.getBoundingClientRect().right)]"""
FIGURES = "[...document.querySelectorAll('#figures tbody tr')].map((row) => [...row.cells].map((c) => c.innerText))"
DONE = "!document.getElementById('verdict').hidden"


@pytest.fixture(scope="module")
def chromium() -> str:
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium; install it, or set QAP_CHROMIUM to its path")
    return program


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Tab]:
    with browsing(chromium) as found:
        yield found


@pytest.fixture
def tab(browser: Tab) -> Tab:
    browser.requested.clear()
    browser.complaints.clear()
    return browser


def text(tab: Tab, selector: str) -> Any:
    return tab.run(f"document.querySelector({selector!r}).textContent")


def click(tab: Tab, selector: str) -> None:
    tab.run(f"document.querySelector({selector!r}).click()")


def marked(tab: Tab) -> int:
    """Patches that are not dimmed."""
    return sum(rgba.endswith(",0") for rgba in tab.run(MIDDLES))


def ask_the_sample(tab: Tab, question: str = QUESTION, picture: Path = SAMPLE) -> None:
    tab.wait("document.getElementById('model').textContent")
    tab.give_file("#file", picture)
    tab.wait("!document.getElementById('stage').hidden")
    tab.run(f"document.getElementById('question').value = {question!r}")
    click(tab, "#go")
    tab.wait(DONE)


def test_a_picture_is_asked_and_k_is_moved(server: Served, tab: Tab, tmp_path: Path) -> None:
    """The sample but for a pixel, so that no other test of this server has had it encoded."""
    picture = Image.open(SAMPLE).convert("RGB")
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(tmp_path / "picture.png")
    tab.go(server.url + "/qap")
    ask_the_sample(tab, picture=tmp_path / "picture.png")
    assert text(tab, "#dense .text") == "boat"
    assert text(tab, "#pruned .text")
    assert text(tab, "#dense-title") == "All 144 tokens"
    assert text(tab, "#pruned-title") == "72 tokens kept"
    assert marked(tab) == 72
    found = {name: (dense, pruned) for name, dense, pruned in tab.run(FIGURES)}
    assert found["Image tokens"] == ("144", "72")
    n_dense, n_pruned = (int(cells) for cells in found["KV cells of the prompt"])
    assert n_dense - n_pruned == 72
    for name in ("Image encoder", "Prefill", "First token after"):
        assert all(told.endswith("s") for told in found[name]), found
    assert len(set(found["Image encoder"])) == 1  # one encode, counted on both sides

    tab.run("document.getElementById('k').focus()")
    for _ in range(3):
        tab.press("ArrowLeft", 37)
    tab.wait("document.getElementById('pruned-title').textContent === '69 tokens kept'")
    tab.wait(DONE)
    assert marked(tab) == 69
    assert text(tab, "#k-told") == "69 of 144 tokens · 48\u00a0%"
    assert text(tab, "#dense .text") == "boat"  # not asked again

    for view in ("error", "outlier", "semantic", "total"):
        click(tab, f"input[value={view}]")
        assert len(set(tab.run(MIDDLES))) >= (3 if view == "semantic" else 20), view  # attention is on the objects
        assert tab.run("!document.getElementById('scale').hidden"), view
    click(tab, "input[value=plain]")
    assert marked(tab) == 144

    asked = [url for url in tab.requested if not url.startswith(("data:", "blob:"))]
    assert len(asked) >= 9
    assert all(url.startswith(server.url + "/") for url in asked), asked
    assert tab.complaints == []


def test_the_sample_needs_no_mouse(server: Served, tab: Tab) -> None:
    """Enter on the button, in the question, and arrows among the views."""
    tab.go(server.url + "/qap")
    tab.wait("document.getElementById('model').textContent")
    click(tab, "#sample")
    tab.wait("document.activeElement.id === 'question'")
    tab.press("Enter", 13)
    tab.wait(DONE)
    tab.run("document.querySelector('input[name=view]:checked').focus()")
    tab.press("ArrowRight", 39)
    assert tab.run("document.querySelector('input[name=view]:checked').value") == "error"
    assert "Quantization error" in tab.run("document.getElementById('overlay').getAttribute('aria-label')")
    assert tab.complaints == []


def test_on_a_phone_nothing_is_cut_off(server: Served, tab: Tab) -> None:
    tab.go(server.url + "/qap", 360, 740, phone=True, dark=True)
    assert max(tab.run(EDGES)) <= 360
    ask_the_sample(tab)
    assert max(tab.run(EDGES)) <= 360
    heights = "[...document.querySelectorAll('button, .button, .views label')].map((e) => e.offsetHeight)"
    assert all(height == 0 or height >= 36 for height in tab.run(heights))
    assert tab.run("getComputedStyle(document.querySelector('.camera')).display") != "none"
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(15, 17, 21)"


def test_a_letterboxed_picture_is_shown_as_the_model_saw_it(server: Served, tab: Tab, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.effect_noise((400, 200), 90).save(wide)
    tab.go(server.url + "/qap")
    tab.wait("document.getElementById('model').textContent")
    tab.give_file("#file", wide)
    shape = "(({ width, height }) => width / height)(document.getElementById('stage').getBoundingClientRect())"
    tab.wait("!document.getElementById('stage').hidden")
    assert tab.run(shape) == pytest.approx(2, rel=0.02)
    click(tab, "#go")
    tab.wait(DONE)
    assert tab.run(shape) == pytest.approx(1, rel=0.02)
    place = """(([stage, picture]) => [
      (picture.left - stage.left) / stage.width, (picture.top - stage.top) / stage.height,
      picture.width / stage.width, picture.height / stage.height,
    ])(["stage", "picture"].map((id) => document.getElementById(id).getBoundingClientRect()))"""
    assert tab.run(place) == pytest.approx([0, 0.25, 1, 0.5], abs=0.01)
    assert marked(tab) == 72  # all that is no padding
    assert text(tab, "#k-told") == "72 of 72 tokens · 100\u00a0%"


def test_limits_and_errors_are_told(server: Served, tab: Tab, tmp_path: Path) -> None:
    """The server of these tests takes pictures of 1 MiB, and contexts of 512 tokens."""
    noise = tmp_path / "noise.png"
    Image.effect_noise((1100, 1100), 90).save(noise)
    assert noise.stat().st_size > 2**20
    tab.go(server.url + "/qap")
    tab.wait("document.getElementById('model').textContent")
    click(tab, "#go")
    assert text(tab, "#error") == "Choose a picture first"
    tab.give_file("#file", noise)
    assert "Sent as a JPEG" in tab.wait("document.getElementById('note').textContent")
    tab.run("document.getElementById('question').value = 'word '.repeat(700)")
    click(tab, "#go")
    tab.wait("!document.getElementById('error').hidden")
    assert "n_ctx" in text(tab, "#error")
    noise.write_bytes(b"hello")
    tab.give_file("#file", noise)
    tab.wait("document.getElementById('error').textContent.includes('cannot read that file')")


def test_the_key_is_asked_for(tab: Tab) -> None:
    with serving("--api-key", "secret", "--ctx", "512", "--keep-ratio", "0.125") as served:
        tab.go(served.url + "/qap")
        for key in ("wrong", "secret"):
            tab.wait("document.getElementById('key').open")
            tab.run(f"document.getElementById('key-value').value = {key!r}")
            click(tab, "#key-form button")
        ask_the_sample(tab)
        assert marked(tab) == 18
        kept = "[sessionStorage.getItem('qap-key'), localStorage.length, document.cookie]"
        assert tab.run(kept) == ["secret", 0, ""]


def test_tiles_are_drawn_side_by_side(server: Served, tab: Tab) -> None:
    """What a model that cuts pictures into tiles would tell: without the picture, each tile by itself."""
    tab.go(server.url + "/qap")
    script = """import("/qap/picture.js").then(({ draw, drawable, find }) => {
      document.getElementById("stage").hidden = false;
      const rows = [[0, 1, 5], [2]].map((indices) => ({ n_tokens: 6, grid: [3, 2], indices }));
      const under = [[0.9, 0.1], [0.6, 0.9]].map((place) => find(rows, ...place).token);
      return [draw(document.getElementById("overlay"), rows, "kept"), drawable([{ n_tokens: 6 }]), ...under];
    })"""
    assert tab.run(script) == [4, False, 2, 3]
