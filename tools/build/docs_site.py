"""Hooks of mkdocs.yml: pages that stand outside docs/, pages that are generated, and links that work in both places.

The Markdown files are read on a forge too, so their links are paths in the repository. Here each becomes the page of
the site that shows that file; a link to a file that the site does not show becomes its text, and a link to nothing is a
warning, which ``mkdocs build --strict`` makes an error. The command line's page is what ``--help`` prints, the Python
page lists ``qap_gguf.__all__``: both need the installed package.
"""

from __future__ import annotations

import base64
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[2]
TOUR: Final = "examples/tour.ipynb"
#: Page of the site -> the file of the repository that it shows.
PAGES: Final = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "packaged-model.md": "python/qap_gguf/models/tiny_llava/README.md",
    "tour.md": TOUR,
}
#: The Python page: heading -> names. tests/docs/test_site.py compares them with qap_gguf.__all__.
API: Final = {
    "Models and answers": ("VisionModel", "Generation", "GenerationStats", "ChatHandler", "SourceRules"),
    "Pruning": (
        "PruneConfig", "set_default", "get_default", "use", "PrunedImage", "Scores", "score", "select", "plot",
    ),
    "Many pictures": ("batch", "BatchResult"),
    "Pictures": ("ImageEmbedding", "EmbeddingCache", "CacheStats", "set_image_cache", "set_resize"),
    "Files": (
        "convert", "ConvertResult", "requantize", "Requantized", "annotate",
        "check_files", "CheckReport", "packaged_model", "PackagedModel",
    ),
    "Machine": ("info", "set_device"),
    "Errors": (
        "QapError", "ArrayError", "ConfigError", "ConvertError", "DataError", "ImageError", "ModelFileError",
        "NativeError", "PinError", "UnsupportedError",
    ),
}  # fmt: skip
HELP_WIDTH: Final = 96
#: Splits into text, a fenced block, its marker, text, ...
_FENCE: Final = re.compile(r"(^(```+|~~~+).*?^\2[ ]*$)", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^)\s]+)\)")
_FETCHED: Final = re.compile(
    r'<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="?https?:[^>]*>'
)
_log = logging.getLogger("mkdocs.hooks.docs_site")


def page_of(path: str) -> str | None:
    """The page or picture of the site that shows `path` of the repository; None where there is none."""
    for page, source in PAGES.items():
        if source == path:
            return page
    if path == "examples" or path.startswith("examples/"):
        return "examples.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def linked(markdown: str, source: str, page: str) -> str:
    """The Markdown of `source`, a path of the repository, with its links turned to the pages of the site."""

    def replace(match: re.Match[str]) -> str:
        to, _, anchor = match["to"].partition("#")
        if not to or re.match(r"[a-z]+:", to):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), to))
        if not (ROOT / path).exists():
            _log.warning("%s links to '%s', which is not in the repository", source, match["to"])
            return match[0]
        target = page_of(path)
        if target is None:
            return match["text"]
        relative = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"{match['image']}[{match['text']}]({relative}{'#' + anchor if anchor else ''})"

    # a link's text may hold code, so only fences are left out
    parts = _FENCE.split(markdown)
    return "".join(_LINK.sub(replace, part) if n % 3 == 0 else part for n, part in enumerate(parts) if n % 3 != 2)


def command_line() -> str:
    """What each command's ``--help`` prints."""
    import click

    from qap_gguf.cli.main import cli

    width: dict[str, Any] = {"terminal_width": HELP_WIDTH, "max_content_width": HELP_WIDTH}
    whole = click.Context(cli, info_name="qap-gguf", **{**cli.context_settings, **width})
    parts = ["# Command line\n\nWhat `qap-gguf --help` and each command's `--help` print."]
    parts.append(f"```text\n{cli.get_help(whole)}\n```")
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=name, parent=whole, **{**command.context_settings, **width})
        parts.append(f"## qap-gguf {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"


def python_api() -> str:
    """Directives of mkdocstrings for the public names, in groups."""
    parts = ["# Python\n\n```python\nimport qap_gguf as qap\n```\n"]
    for heading, names in API.items():
        parts.append(f"## {heading}\n")
        parts += [f"::: qap_gguf.{name}\n" for name in names]
    return "\n".join(parts)


def examples() -> str:
    """The programs of examples/."""
    parts = ["# Examples\n\nEach runs as it stands, with the packaged model where no other is named.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n")
    return "\n".join(parts)


def notebook(cells: list[dict[str, Any]], folder: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook's cells with what they showed, and its pictures by path."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{folder}/{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![what this cell shows]({name})")
            elif shown := "".join(output.get("text", data.get("text/plain", ""))).rstrip("\n"):
                parts.append(f"```text\n{shown}\n```")
    return "\n\n".join(parts) + "\n", pictures


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not stand in docs/."""
    from mkdocs.structure.files import File

    generated: dict[str, str | bytes] = {"cli.md": command_line(), "api.md": python_api(), "examples.md": examples()}
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == TOUR:
            text, pictures = notebook(json.loads(text)["cells"], "tour")
            generated.update(pictures)
        generated[page] = text
    for uri, content in generated.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of pages that stand in the repository."""
    uri = page.file.src_uri
    if uri == "tour.md":
        return re.sub(r"\]\(\.\./docs/", "](", markdown)
    source = PAGES.get(uri, f"docs/{uri}")
    return linked(markdown, source, uri) if (ROOT / source).is_file() else markdown


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """A reader's browser fetches nothing from elsewhere."""
    for found in _FETCHED.findall(output):
        _log.warning("%s would fetch something: %s", page.file.src_uri, found)
    return output
