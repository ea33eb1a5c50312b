#!/usr/bin/env python3
"""Build the native tests under sanitizers and run them; `make sanitize` runs this.

    python tools/build/sanitize.py            # AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer
    python tools/build/sanitize.py --only address --mutations 2000
    python tools/build/sanitize.py --hooks         # and libmtmd with the hooks

Instrumented is our own C++ (native/src; the hooks, which live in libmtmd, with --hooks); ggml and llama are the
installed ones. The damaged files that the tests read are made by tools/fuzz/gguf_mutations.py. Exit 1 for a report of a
sanitizer, or a test that fails.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import fetch_upstream

sys.path.append(str(Path(__file__).resolve().parents[1] / "fuzz"))
from gguf_mutations import KINDS, Gguf
from tiny_mmproj import PROJECTORS, tiny_mmproj, tiny_tower

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "python" / "qap_gguf" / "models" / "tiny_llava"
SANITIZERS = {"address": "address,undefined", "thread": "thread"}


def build(name: str, folder: Path, hooks: bool) -> None:
    """Configure and compile; only what changed, the second time."""
    pin = fetch_upstream.read_pin(ROOT / "native" / "upstream" / "PIN")
    site = sysconfig.get_path("platlib")
    here = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        raise SystemExit("sanitize: expected cmake, found none; run make venv, or install it")
    settings = {
        "QAP_SANITIZE": SANITIZERS[name],
        "QAP_UPSTREAM_VERSION": pin.version,
        "CMAKE_PREFIX_PATH": site,
        "CMAKE_BUILD_RPATH": str(Path(site) / "llama_cpp" / "lib"),
        "QAP_UPSTREAM": "",
    }
    if hooks:
        tree = folder / "upstream"
        if fetch_upstream.main(["--apply", str(tree)]) != 0:
            raise SystemExit("sanitize: the upstream sources could not be prepared; the reason is the line above")
        settings["QAP_UPSTREAM"] = str(tree)
    words = [f"-D{key}={value}" for key, value in settings.items()]
    if shutil.which("ninja", path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}"):
        words += ["-G", "Ninja"]
    env = os.environ | {"PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}"}
    for command in (
        [cmake, "-S", str(ROOT / "native" / "tests"), "-B", str(folder), *words],
        [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode != 0:
            raise SystemExit(f"sanitize: {' '.join(command[:2])} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def damaged_files(folder: Path, count: int) -> None:
    """`count` damaged files of every kind, and the whole ones that they were made from."""
    whole = {name: tiny_mmproj(name) for name in PROJECTORS}
    whole |= {"tower": tiny_tower(), "mlp": (MODELS / "mmproj-f16.gguf").read_bytes()}
    for name, data in whole.items():
        (folder / f"{name}.gguf").write_bytes(data)
        file = Gguf(data)
        for number in range(count // len(whole)):
            rng = random.Random(f"{name}/{number}")
            (folder / f"{name}-{number}.gguf").write_bytes(KINDS[number % len(KINDS)](rng, file))
    model = Gguf((MODELS / "tiny-llava-Q4_0.gguf").read_bytes())
    (folder / "model.gguf").write_bytes(model.whole)
    for number, kind in enumerate(KINDS):
        (folder / f"model-{number}.gguf").write_bytes(kind(random.Random(number), model))


def run(program: Path, *words: str) -> tuple[bool, str]:
    """Whether it ended well, and its last line (all that it said where it did not)."""
    # ThreadSanitizer cannot place its shadow memory where addresses are spread widely
    still = [setarch, platform.machine(), "-R"] if (setarch := shutil.which("setarch")) else []
    leaks = int(sys.platform.startswith("linux"))  # LeakSanitizer is not everywhere
    options = {
        "ASAN_OPTIONS": f"detect_leaks={leaks}:detect_stack_use_after_return=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=0:second_deadlock_stack=1",
    }
    done = subprocess.run(
        [*still, str(program), *words], capture_output=True, text=True, check=False, env=os.environ | options
    )
    if done.returncode == 0:
        return True, done.stdout.strip().splitlines()[-1]
    return False, (done.stdout + done.stderr).strip()


def main() -> int:
    """Print one line for each program, then the count of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SANITIZERS))
    parser.add_argument("--mutations", type=int, default=280, help="damaged files (default 280)")
    parser.add_argument("--rounds", type=int, default=300, help="random features (default 300)")
    parser.add_argument("--hooks", action="store_true", help="libmtmd with the hooks too; compiles for minutes")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where the build folders stand")
    args = parser.parse_args()
    failed = 0
    for name in [args.only] if args.only else list(SANITIZERS):
        started = time.perf_counter()
        place = args.build / f"sanitize-{name}"
        hooks = args.hooks and name == "address"
        build(name, place, hooks)
        built = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder)
            if name == "address":
                damaged_files(files, args.mutations)
                programs = [("test-plain", [str(args.rounds)]), ("test-files", [folder])]
                if hooks:
                    pair = [str(MODELS / "mmproj-f16.gguf"), str(MODELS / "tiny-llava-Q4_0.gguf")]
                    programs.append(("test-hooks", [*pair, "40"]))
                planted, report = ("test-plain", "overrun"), "AddressSanitizer: heap-buffer-overflow"
            else:
                (files / "tower.gguf").write_bytes(tiny_tower())
                programs = [("test-threads", [str(files / "tower.gguf"), "20"])]
                planted, report = ("test-threads", "race"), "ThreadSanitizer: data race"
            if report not in run(place / planted[0], planted[1])[1]:
                print(f"{SANITIZERS[name]}: FAILED; a planted fault is not reported, so that nothing below means much")
                failed += 1
            for program, words in programs:
                ended_well, said = run(place / program, *words)
                failed += not ended_well
                print(f"{SANITIZERS[name]} {program}: {'no report' if ended_well else 'FAILED'}; {said}", flush=True)
        print(
            f"sanitize: {name}: built in {built:.0f} s, all in {time.perf_counter() - started:.0f} s", file=sys.stderr
        )
    print(f"{failed} sanitizer reports or failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
