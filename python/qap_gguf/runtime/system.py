"""What is installed, where it was loaded from, and whether it is what this build was made for."""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qap_gguf import _core
from qap_gguf.runtime import amx as _amx
from qap_gguf.runtime import load as _load
from qap_gguf.runtime.devices import aliases, list_devices


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def loaded_libraries() -> list[str]:
    """Paths of the ggml, llama and mtmd libraries in this process (Linux; elsewhere the folder of ours)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return [str(_load.library_folder())]
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    stems = ("libggml", "libllama", "libmtmd", "libqap", "_core.")
    return sorted(path for path in paths if Path(path).name.startswith(stems))


def info() -> dict[str, Any]:
    """Versions, commits, library paths, devices and pin status, as plain values ready for JSON.

    Example:
        >>> import qap_gguf as qap
        >>> qap.info()["pin"]["status"]
        'ok'
    """
    llama_cpp = import_module("llama_cpp")
    table = list_devices()
    words = aliases(table)
    return {
        "versions": {
            "qap_gguf": _core.__version__,
            "llama-cpp-python": str(llama_cpp.__version__),
            "gguf": _version_of("gguf"),
            "numpy": _version_of("numpy"),
            "python": platform.python_version(),
            "platform": f"{sys.platform} {platform.machine()}",
        },
        "pin": {
            "expected": f"llama-cpp-python {_load.LLAMA_CPP_PYTHON}",
            "built_from": f"llama-cpp-python {_core.upstream_version}",
            "status": "ok",  # another version does not get as far as this
        },
        "ggml": {"version": _core.ggml_version(), "commit": _core.ggml_commit()},
        "libraries": loaded_libraries(),
        "devices": [
            {
                "name": device.name,
                "aliases": words[device.name],
                "description": device.description,
                "type": device.kind,
                "backend": device.backend,
                "memory_free_bytes": device.memory_free,
                "memory_total_bytes": device.memory_total,
            }
            for device in table
        ],
        "cpu_features": _core.system_info(),
        "amx": _amx.state(_core, Path(str(llama_cpp.__file__)).parent / "lib"),
        "hooks": {"disabled": _core.disabled(), "stock_encoder": _core.stock_encoder()},
    }
