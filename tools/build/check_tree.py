#!/usr/bin/env python3
"""House rules that no linter knows; `make lint` runs this. Prints one line for each finding, exit 1 if there is one.

    python tools/build/check_tree.py

- no source file above 400 lines, no tab or trailing space in it, a newline at its end;
- no network address in a source file, and no absolute home path;
- one-way imports: a room of the package (a folder, or a module at its top) imports only rooms below it in ROOMS;
  reference/ imports NumPy, the standard library and itself only; nothing under python/ imports tools or tests;
- the public header says extern "C" and names no C++ type (the compiler check that it is C stands in the Makefile).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400
FOLDERS = ("native", "python", "tools", "tests", ".github", ".ci", "benchmarks", "examples")
TOP = ("CMakeLists.txt", "Dockerfile", "Makefile", "mkdocs.yml", "pyproject.toml")
SUFFIXES = {
    ".py", ".pyi", ".cpp", ".c", ".h", ".inc", ".cmake", ".txt", ".toml", ".yml", ".yaml", ".sh",
    ".html", ".css", ".js", "",
}  # fmt: skip
#: Rooms from top to bottom, those of a line on a level; CONTRIBUTING.md says what is in them.
ROOMS = (
    ("__main__",), ("cli",), ("ray",), ("batch",), ("serve",), ("eval", "bench", "load_trial"), ("chat",), ("model",),
    ("image_side",), ("generation", "convert", "plotting"), ("pruning",), ("vision",), ("language",), ("files",),
    ("defaults",), ("runtime", "config", "arguments", "reference"), ("errors",), ("_core",),
)  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
ADDRESS = re.compile(r"\bhttps?://(?!example\b)[\w.]|\b[\w-]+\.(?:pythonhosted|huggingface|pytorch)\.\w+")
HOME = re.compile(r"/(?:root|home|Users)/\w")


def sources(root: Path) -> Iterator[Path]:
    """Our source files: text that people edit. Patches, models, pictures and caches are not."""
    for name in TOP:
        if (root / name).is_file():
            yield root / name
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            skipped = any(part == "__pycache__" or part.endswith("_cache") for part in path.parts)
            in_models = "models" in path.parts and path.suffix != ".py"
            if path.is_file() and path.suffix in SUFFIXES and not skipped and not in_models:
                yield path


def check_text(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(line, finding) of the rules about plain text."""
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        yield len(lines), f"expected at most {MAX_LINES} lines, got {len(lines)}; split the file"
    if text and not text.endswith("\n"):
        yield len(lines), "expected a newline at the end of the file; add one"
    for number, line in enumerate(lines, 1):
        if line != line.rstrip():
            yield number, "trailing space; remove it"
        if "\t" in line and path.name != "Makefile":
            yield number, "a tab; use spaces"
        if ADDRESS.search(line) and path != Path(__file__).resolve():
            yield number, "a network address; name the thing instead"
        if HOME.search(line) and path != Path(__file__).resolve():
            yield number, "a path below somebody's home; use a relative one"


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of each import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def check_imports(name: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, finding) of the rules about layers, for a file named `name` below python/qap_gguf."""
    room = name.removesuffix(".py").split("/")[0]
    if room not in LEVEL and room != "__init__":
        yield 1, f"expected a room of ROOMS in tools/build/check_tree.py, got {room}; add it, and to CONTRIBUTING.md"
    for line, module in imported(ast.parse(text)):
        top, *inner = module.split(".")
        other = inner[0] if top == "qap_gguf" and inner else ""
        if other != room and other in LEVEL and LEVEL[other] <= LEVEL.get(room, -1):
            yield line, f"{room} imports {other}; imports go one way, {' > '.join('/'.join(rooms) for rooms in ROOMS)}"
        if top in ("tests", "fetch_upstream", "refresh_patch", "make_scenes", "emoji_scenes", "emoji_scenes_hard"):
            yield line, f"the package imports {top}; move what it needs into the package"
        own = module == "qap_gguf.reference" or module.startswith("qap_gguf.reference.")
        if name.startswith("reference/") and not own and top != "numpy" and top not in sys.stdlib_module_names:
            yield line, f"reference/ imports {module}; it is the truth and imports NumPy only"


def check_header(text: str) -> Iterator[tuple[int, str]]:
    """(line, finding) of the rules about native/include/qap.h."""
    if 'extern "C"' not in text:
        yield 1, 'expected extern "C" in the public header; add the usual guard'
    code = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    for number, line in enumerate(code.splitlines(), 1):
        if re.search(r"\bstd::|\btemplate\s*<|\bnamespace\b|\bclass\b", line):
            yield number, "C++ in the public header; it is C with opaque types"


def findings(root: Path) -> Iterator[str]:
    """`path:line: finding` for everything that is wrong below `root`."""
    package = root / "python" / "qap_gguf"
    for path in sources(root):
        text = path.read_text(encoding="utf-8")
        rows = list(check_text(path, text))
        if path.suffix == ".py" and package in path.parents:
            rows += check_imports(path.relative_to(package).as_posix(), text)
        if path == root / "native" / "include" / "qap.h":
            rows += check_header(text)
        yield from (f"{path.relative_to(root)}:{line}: {what}" for line, what in sorted(rows))


def main() -> int:
    """Print the findings."""
    rows = list(findings(ROOT))
    for row in rows:
        print(row)
    print(f"check_tree: {len(rows)} finding(s) in {len(list(sources(ROOT)))} files", file=sys.stderr)
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main())
