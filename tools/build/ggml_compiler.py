#!/usr/bin/env python3
"""Print "sound" or "broken" and the compiler of the ggml that the package is built against, for CMakeLists.txt.

    python tools/build/ggml_compiler.py FOLDER      # with llama-cpp-python's libraries

"broken": its AMX kernels cannot be trusted (python/qap_gguf/runtime/amx.py). Programs that load our library have no
Python to ask, so the answer is compiled in. A package that was built elsewhere asks again when Python imports it.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

AMX = Path(__file__).resolve().parents[2] / "python/qap_gguf/runtime/amx.py"


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        print(f"ggml_compiler: expected a folder with ggml's libraries, got {argv}; pass one", file=sys.stderr)
        return 1
    sys.modules.setdefault("amx", type(sys)("amx"))  # dataclasses look their module up by its name
    found = runpy.run_path(str(AMX), run_name="amx")["ggml_compiler"](Path(argv[0]))
    print("broken;none" if found is None else f"{'sound' if found.sound else 'broken'};{found}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
