"""llama.cpp's own converter, as the pinned sources have it: which models it knows, and one run of it.

Facts: convert_hf_to_gguf.py, conversion/__init__.py (the table of architectures), conversion/base.py
(get_model_architecture; AutoTokenizer is called with trust_remote_code), gguf-py's GGUFWriter (its progress bar).
CMake installs these files unchanged, with their licence, in share/llama.cpp beside the native module.

A checkpoint's own code never runs: the converter sees the folder as links in a temporary one, without *.py files,
without `auto_map` in its JSON files, and offline.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qap_gguf.convert.source.checkpoint import read_json
from qap_gguf.convert.upstream.child import RENAMED
from qap_gguf.errors import ConvertError
from qap_gguf.runtime.load import library_folder

__all__ = ["architecture", "known_architectures", "run_converter", "view"]

_MAP = "MMPROJ_MODEL_MAP"
_NEEDS = ("torch", "transformers", "sentencepiece")
_CODE = {".py", ".pyc", ".so"}
_BAR = re.compile(rb"Writing:\s+(\d+)%")
_RUN = re.compile(rb"^qap-run (\d+)\r?$", re.MULTILINE)
_ERROR = re.compile(r"(?:ERROR\b|[\w.]*(?:Error|Exception)\b)[^:]*:\s*(.+)")
_TAIL = 1 << 16  # bytes of the converter's log that are kept


def converter_folder() -> Path:
    """The folder with convert_hf_to_gguf.py. Raises ConvertError where the package was installed without it."""
    folder = library_folder().parent / "share" / "llama.cpp"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise ConvertError(f"expected llama.cpp's converter in {folder}, found none; install qap_gguf again")
    return folder


def known_architectures() -> frozenset[str]:
    """The architectures with a vision encoder that llama.cpp's converter knows, here too by newer names than its own.

    Example:
        >>> "Qwen2VLForConditionalGeneration" in known_architectures()
        True
    """
    source = (converter_folder() / "conversion" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == _MAP and node.value is not None:
            return frozenset(ast.literal_eval(node.value)) | frozenset(RENAMED)
    raise ConvertError(f"expected {_MAP} in llama.cpp's converter, found none; install qap_gguf again")


def architecture(config: dict[str, Any]) -> str:
    """The architecture that a parsed config.json names for the vision part, "" where it names none.

    Example:
        >>> architecture({"architectures": ["InternVLChatModel"], "vision_config": {"architectures": ["InternViT"]}})
        'InternViT'
    """
    vision = config.get("vision_config")
    for names in (
        (vision or {}).get("architectures") if isinstance(vision, dict) else None,
        config.get("architectures"),
    ):
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
    return ""


@contextlib.contextmanager
def view(folder: Path) -> Iterator[Path]:
    """A temporary folder with links to the checkpoint's files, less the code that it may bring."""
    with tempfile.TemporaryDirectory(prefix="qap-convert-") as place:
        for path in folder.iterdir():
            if not path.is_file() or path.suffix in _CODE:
                continue
            target = Path(place) / path.name
            settings = read_json(path) if path.name.endswith("config.json") else {}
            if "auto_map" in settings:
                del settings["auto_map"]
                target.write_text(json.dumps(settings), encoding="utf-8")
            else:
                target.symlink_to(path.resolve())
        yield Path(place)


def run_converter(runs: dict[str, list[str]], pre: str, on_progress: Callable[[int, float], None]) -> None:
    """Runs the converter once for each of `runs`, {what is read, for errors: arguments}.

    pre: the pre-tokenizer's name for a tokenizer whose hash the converter does not know, "" for none.
    on_progress: gets the number of the run and the fraction of its file that is written, 0..1.
    Raises ConvertError with the converter's last words where it fails. Any exception of `on_progress` ends it.
    """
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise ConvertError(
            f"expected {', '.join(missing)} for llama.cpp's converter, found none; "
            "pip install torch transformers sentencepiece"
        )
    child = Path(__file__).with_name("child.py")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NO_LOCAL_GGUF")}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(child), str(converter_folder()), pre, *map(json.dumps, runs.values())]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0)
    log, number = b"", 0
    try:
        assert process.stderr is not None
        while piece := os.read(process.stderr.fileno(), 1 << 14):
            log = (log + piece)[-_TAIL:]
            number, part = _where(log, number)
            on_progress(number, part)
        status = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        if process.stderr is not None:
            process.stderr.close()
    if status:
        raise _failure(list(runs)[number], _reason(log, status))


def _where(log: bytes, number: int) -> tuple[int, float]:
    """(number of the run, fraction of its file that is written) by the end of the log."""
    marks = list(_RUN.finditer(log))
    if marks:
        number, log = int(marks[-1][1]), log[marks[-1].end() :]
    bars = _BAR.findall(log[-4096:])
    return number, int(bars[-1]) / 100 if bars else 0.0


def _failure(what: str, reason: str) -> ConvertError:
    cure = "fetch the checkpoint again, or see whether this model is supported at all"
    if f"Errno {errno.ENOSPC}" in reason or f"Errno {errno.EDQUOT}" in reason:
        cure = "free some space or choose another OUT"
    elif "signal 9" in reason:
        cure = "free some memory"
    return ConvertError(f"expected llama.cpp's converter to read {what}, got a refusal ({reason}); {cure}")


def _reason(log: bytes, status: int) -> str:
    """The last line of a log that says what went wrong."""
    if status < 0:
        return f"ended by signal {-status}"
    lines = [line.strip() for line in log.decode("utf-8", "replace").replace("\r", "\n").splitlines() if line.strip()]
    found = [line for line in lines if _ERROR.match(line)]
    return " ".join((found or lines or [f"exit {status}"])[-1].split())[:300]
