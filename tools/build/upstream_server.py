#!/usr/bin/env python3
"""Build llama.cpp's own llama-server of the pinned sources, unpatched, against llama-cpp-python's own libmtmd.

    python tools/build/upstream_server.py build/upstream-server      # the last line is the program's path

What benchmarks/server_clients.py compares ours with: same sources, same libllama and ggml, same compiler, no hook of
ours. Takes some minutes of one core. Needs what `make install` brought: llama-cpp-python, cmake and ninja in this
Python's environment. Any build of another llama.cpp will do as well, if its ggml was compiled alike.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
UI = HERE.parents[1] / "native/programs/ui.h"  # says that there is no web page

_CMAKE = """\
cmake_minimum_required(VERSION 3.21)
project(upstream_server LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 17)
find_package(Threads REQUIRED)
file(GLOB sources "{tree}/tools/server/*.cpp")
add_executable(llama-server ${{sources}} "{tree}/vendor/cpp-httplib/httplib.cpp")
set_source_files_properties("{tree}/vendor/cpp-httplib/httplib.cpp" PROPERTIES COMPILE_DEFINITIONS
    "CPPHTTPLIB_FORM_URL_ENCODED_PAYLOAD_MAX_LENGTH=1048576;CPPHTTPLIB_LISTEN_BACKLOG=512;CPPHTTPLIB_REQUEST_URI_MAX_LENGTH=32768;CPPHTTPLIB_TCP_NODELAY=1")
target_include_directories(llama-server SYSTEM PRIVATE "{ui}" "{tree}/tools/mtmd" "{tree}/common" "{tree}/tools/server"
    "{tree}" "{tree}/vendor" "{site}/include")
target_compile_definitions(llama-server PRIVATE LLAMA_SHARED GGML_SHARED MTMD_VIDEO LLAMA_SUBPROCESS)
target_compile_options(llama-server PRIVATE -w)
target_link_libraries(llama-server PRIVATE {libraries} Threads::Threads)
set_target_properties(llama-server PROPERTIES BUILD_WITH_INSTALL_RPATH ON
    INSTALL_RPATH "{site}/llama_cpp/lib;{site}/lib")
"""


def _library(folder: Path, name: str) -> Path:
    for suffix in (".so", ".dylib"):
        if (folder / f"lib{name}{suffix}").is_file():
            return folder / f"lib{name}{suffix}"
    raise SystemExit(f"upstream_server: expected lib{name} in {folder}, found none; run make install first")


def _tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"upstream_server: expected {name}, found none; run make install, or pip install {name}")
    return found


def build(folder: Path) -> Path:
    """Build it below `folder`; what is there already is built no second time.

    Returns:
        The program.
    """
    fetched = subprocess.run(
        [sys.executable, str(HERE / "fetch_upstream.py")], stdout=subprocess.PIPE, text=True, check=True
    )
    tree, site = fetched.stdout.splitlines()[-1], Path(sysconfig.get_path("platlib"))
    own = [_library(site / "llama_cpp/lib", name) for name in ("mtmd", "llama", "ggml", "ggml-base")]
    libraries = " ".join(f'"{path}"' for path in (_library(site / "lib", "llama-common"), *own))
    (folder / "ui").mkdir(parents=True, exist_ok=True)
    shutil.copy2(UI, folder / "ui/ui.h")  # alone: beside it lies a header of ours
    text = _CMAKE.format(tree=tree, site=site, ui=folder / "ui", libraries=libraries)
    (folder / "CMakeLists.txt").write_text(text)
    words = [
        _tool("cmake"),
        "-S",
        str(folder),
        "-B",
        str(folder / "build"),
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    subprocess.run([*words, f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"], check=True, stdout=sys.stderr)
    subprocess.run([_tool("cmake"), "--build", str(folder / "build")], check=True, stdout=sys.stderr)
    return folder / "build/llama-server"


def main() -> int:
    """Print the path of the program."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit((__doc__ or "").strip())
    try:
        print(build(Path(sys.argv[1]).resolve()))
    except subprocess.CalledProcessError as err:
        raise SystemExit(f"upstream_server: {Path(err.cmd[0]).name} failed; the reason is above") from err
    return 0


if __name__ == "__main__":
    sys.exit(main())
