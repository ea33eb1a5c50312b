"""Load the native libraries in the only order that works, and refuse what cannot work with one clear line.

Facts (docs/design.md, "Libraries"): llama-cpp-python opens ``libmtmd`` from the folder in ``MTMD_CPP_LIB`` when its
module ``mtmd_cpp`` is imported, so the variable must point to our library before that. Our library needs the
``libllama`` that ``llama_cpp`` has loaded; loaded earlier, it would bring a second copy into the process. Hence:
llama_cpp, then llama_cpp.mtmd_cpp with our folder, then qap_gguf._core. The last brings libllama-common (chat
templates, schemas), which stands beside a second libllama and finds the loaded one by its name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

from qap_gguf.errors import PinError
from qap_gguf.runtime import amx as _amx

#: The only llama-cpp-python that this build works with; its libraries promise no ABI. Equals native/upstream/PIN.
LLAMA_CPP_PYTHON: Final = "0.3.36"

_LIBRARY: Final = "libmtmd.dylib" if sys.platform == "darwin" else "libmtmd.so"
_VARIABLE: Final = "MTMD_CPP_LIB"


def is_command() -> bool:
    """Whether this process is the command qap-gguf (or ``python -m qap_gguf``), for which a traceback is no message."""
    return Path(sys.argv[0]).name in ("qap-gguf", "-m") and "--debug" not in sys.argv


def library_folder() -> Path:
    """The folder of our libmtmd, beside the native module (which an editable install keeps apart from the sources).

    Raises:
        PinError: the native part was not built.
    """
    spec = importlib.util.find_spec("qap_gguf._core")
    if spec is None or spec.origin is None:
        raise PinError("expected the native module qap_gguf._core, found none; install the package with pip install .")
    folder = Path(spec.origin).resolve().parent / "lib"
    if not (folder / _LIBRARY).is_file():
        raise PinError(f"expected {_LIBRARY} in {folder}, found none; install qap_gguf again")
    return folder


def _check_version() -> None:
    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except ImportError as err:
        raise PinError(
            f"expected llama-cpp-python {LLAMA_CPP_PYTHON}, but it cannot be imported ({err}); "
            f"run pip install llama-cpp-python=={LLAMA_CPP_PYTHON}"
        ) from err
    found = str(getattr(llama_cpp, "__version__", "unknown"))
    if found != LLAMA_CPP_PYTHON:
        raise PinError(
            f"expected llama-cpp-python {LLAMA_CPP_PYTHON}, got {found}; "
            f"run pip install llama-cpp-python=={LLAMA_CPP_PYTHON}, or a qap_gguf made for {found}"
        )


def load() -> ModuleType:
    """Load llama_cpp, our libmtmd under llama_cpp.mtmd_cpp, and qap_gguf._core; return the last.

    Raises:
        PinError: another version of llama-cpp-python is installed, or its multimodal part was imported before us.
    """
    if "llama_cpp.mtmd_cpp" in sys.modules:
        raise PinError(
            "expected to be imported before llama_cpp.mtmd_cpp, which has loaded the stock libmtmd already; "
            "put `import qap_gguf` before the first use of a multimodal chat handler"
        )
    asked = os.environ.get(_VARIABLE)
    _check_version()
    folder = library_folder()
    if asked is not None and Path(asked).resolve() != folder:
        raise PinError(f"expected {_VARIABLE} to be unset, got {asked}; unset it, qap_gguf brings a libmtmd of its own")
    os.environ[_VARIABLE] = str(folder)
    try:
        importlib.import_module("llama_cpp.mtmd_cpp")
    finally:
        # Children of this process that use the stock library are not our business.
        if asked is None:
            del os.environ[_VARIABLE]
    try:
        core = importlib.import_module("qap_gguf._core")
    except ImportError as err:  # libllama-common stands in <site-packages>/lib, and needs OpenSSL where it was built so
        raise PinError(
            f"expected the libraries that llama-cpp-python {LLAMA_CPP_PYTHON} installs, but one cannot be loaded "
            f"({err}); install it and qap_gguf again"
        ) from err
    if core.upstream_version != LLAMA_CPP_PYTHON:
        raise PinError(
            f"expected native code built from llama-cpp-python {LLAMA_CPP_PYTHON}, got {core.upstream_version}; "
            "install qap_gguf again"
        )
    package = sys.modules["llama_cpp"].__file__
    if package is not None:
        _amx.avoid_broken(core, Path(package).parent / "lib")
    return core
