"""The documentation as a site: its pages, its links there and on a forge, and the tour notebook."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import docs_site

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors_of(path: Path) -> set[str]:
    """What a forge and the site call the headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """Relative links of a document that lead nowhere in the repository."""
    found = []
    for link in _LINK.findall(_FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_on_a_forge(path: Path) -> None:
    assert broken_links(path) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One: two\n\n## 3. Four_five\n")
    path = tmp_path / "a.md"
    path.write_text("# A\n[](b.md) [](b.md#one-two) [](b.md#3-four_five) [](#a) [](x:y) [](c.md) [](b.md#x) [](#b)\n")
    assert broken_links(path) == ["c.md", "b.md#x", "#b"]


def test_links_of_the_site() -> None:
    """A path in the repository becomes the page that shows it; what no page shows becomes text; fences stay."""
    text = (
        "[a](docs/chat.md#x) ![b](docs/images/compare.png) [`c`](examples) [d](examples/tour.ipynb) [e](SECURITY.md)"
        " [f](LICENSE) [g](#here) [h](https://example.org/)\n\n```md\n[a](docs/chat.md)\n```\n"
    )
    assert docs_site.linked(text, "README.md", "index.md") == (
        "[a](chat.md#x) ![b](images/compare.png) [`c`](examples.md) [d](tour.md) [e](security.md)"
        " f [g](#here) [h](https://example.org/)\n\n```md\n[a](docs/chat.md)\n```\n"
    )
    text = "[a](../chat.md) [b](../../SECURITY.md) [c](script.md) [d](../images/compare.png)"
    assert docs_site.linked(text, "docs/tutorials/server.md", "tutorials/server.md") == (
        "[a](../chat.md) [b](../security.md) [c](script.md) [d](../images/compare.png)"
    )


def test_a_link_to_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    docs_site.linked("[a](docs/nothing.md)", "README.md", "index.md")
    assert "README.md links to 'docs/nothing.md', which is not in the repository" in caplog.text


def test_the_python_page_has_all_public_names() -> None:
    qap = pytest.importorskip("qap_gguf", reason="needs the installed package", exc_type=ImportError)
    named = [name for names in docs_site.API.values() for name in names]
    assert sorted(named) == sorted(name for name in qap.__all__ if name != "reference")


def test_the_command_page_is_what_help_prints() -> None:
    pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)
    from click.testing import CliRunner

    from qap_gguf.cli.main import cli

    page = docs_site.command_line()
    for words in ([], *([name] for name in cli.commands)):
        done = CliRunner().invoke(
            cli, [*words, "-h"], prog_name="qap-gguf", terminal_width=docs_site.HELP_WIDTH,
            max_content_width=docs_site.HELP_WIDTH,
        )  # fmt: skip
        assert done.exit_code == 0
        assert f"```text\n{done.output.rstrip()}\n```" in page


def test_a_notebook_becomes_a_page() -> None:
    png = b"\x89PNG"
    cells: list[dict[str, Any]] = [
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {
            "cell_type": "code",
            "source": "1",
            "outputs": [
                {"output_type": "stream", "text": ["one\n"]},
                {"data": {"image/png": base64.b64encode(png).decode(), "text/plain": "<Figure>"}},
            ],
        },
    ]
    text, pictures = docs_site.notebook(cells, "tour")
    assert text == "# A\nb\n\n```python\n1\n```\n\n```text\none\n```\n\n![what this cell shows](tour/1.png)\n"
    assert pictures == {"tour/1.png": png}


def test_what_a_browser_would_fetch_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    fine = '<a href="https://example.org/">a</a><script src="site.js"></script><img src="a.png">'
    for text in (
        fine,
        '<script src="https://example.org/a.js">',
        '<link rel="stylesheet" href="https://example.org/a">',
    ):
        caplog.clear()
        assert docs_site.on_post_page(text, page, None) == text
        assert ("would fetch" in caplog.text) == (text != fine)


def test_the_tour_shows_what_it_says() -> None:
    """examples/tour.ipynb, run afresh, shows the texts that are stored in it; it stays small."""
    pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)
    for module in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(module)
    assert (ROOT / docs_site.TOUR).stat().st_size < 300_000
    stored = json.loads((ROOT / docs_site.TOUR).read_text(encoding="utf-8"))
    assert sum("image/png" in out.get("data", {}) for c in stored["cells"] for out in c.get("outputs", [])) >= 5
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo" / "run_tour.py", "--check"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
