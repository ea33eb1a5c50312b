"""A conversion in a process of its own, for tests that fill a disk or stop it.

    python full_disk.py SOURCE OUT [fsize=BYTES] [tmpfs=BYTES] [pause]

fsize: the system refuses to make a file longer than that. tmpfs: OUT is on a disk of that size, in a mount namespace
that goes with this process. In both cases the look at the free space before is left out, so that the write itself
fails; the error is printed, and then the files that are left in OUT, one a line.
pause: the command itself, which says "ready" when the quantizer is due and waits to be stopped.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock


def main(source: str, out: Path, words: list[str]) -> None:
    import qap_gguf as qap
    from qap_gguf.cli import main as command
    from qap_gguf.convert import api

    def pause(*_: object) -> None:
        print("ready", flush=True)
        time.sleep(60)

    if "pause" in words:
        mock.patch.object(api, "quantize_file", pause).start()
        sys.exit(command(["convert", source, str(out), "--quantize", "Q8_0"]))
    mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=1 << 50)).start()
    for word in words:
        name, _, size = word.partition("=")
        if name == "fsize":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
        if name == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out], check=True)
    try:
        qap.convert(source, out, quantize="Q8_0", mmproj_type="f32", name="t")
    except qap.ConvertError as err:
        print(err)
    print(*sorted(out.iterdir()) if out.is_dir() else [], sep="\n", end="")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
