#!/usr/bin/env python3
"""Coverage-guided fuzzing of our C++ by clang's libFuzzer, and of the guards in Python by Atheris; see `make fuzz`.

    python tools/fuzz/coverage_guided.py --seconds 600       # shared by all harnesses
    python tools/fuzz/coverage_guided.py --only gate --seconds 60
    python tools/fuzz/coverage_guided.py --seeds FOLDER      # only write the seeds

The harnesses are native/tests/fuzz/fuzz-*.cpp and tools/fuzz/guards.py; each starts from seeds that are made here and
from what earlier runs found (native/tests/fuzz/corpus/*.zip, where --keep stores the smallest set with that coverage).
Exit 1 for a find; its input lies in build/fuzz/finds. Needs clang with libFuzzer (Debian: apt-get install clang) for
the C++, `pip install atheris` for Python; what is missing is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from gguf_mutations import KINDS, Gguf
from qap_gguf.bench.random_files import make_random_model
from qap_gguf.bench.shapes import Language, Shape, Vision
from tiny_mmproj import PROJECTORS, tiny_mmproj

sys.path.append(str(Path(__file__).resolve().parents[1] / "build"))
import fetch_upstream

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "native" / "tests" / "fuzz" / "corpus"
NATIVE = ("gate", "words", "image")
PYTHON = ("grammar", "schema")
WORDS = (
    b"n_keep\x0018\x00keep_ratio\x000.5", b"alpha\x00dynamic\x00alpha\x000.7", b"select\x00dpp\x00seed\x007",
    b"error\x00q4_0\x00group_size\x0032", b"encoder_keep\x001e-9\x00encoder_layer\x003",
    b"skip_flat_tiles\x00255\x00duplicates\x00off",
    b"positions\x00keep\x00merge\x00average",
)  # fmt: skip
GRAMMARS = (b'root ::= "a" b? [0-9]{2,4}\nb ::= (root | "c")*', b'root ::= ("a" | "a")* # again', b"root ::= [^\\n]+")
SCHEMAS = (
    b'{"type": "object", "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 99}}, "required": ["a"]}',
    b'{"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"}',
    b'{"type": "array", "items": {"enum": ["a", 1]}, "minItems": 2, "maxItems": 9}',
    b'{"type": "string", "pattern": "^[a-z]{2,4}(x|y)*$", "maxLength": 8}',
)
MAX_BYTES = {"gate": 1 << 21, "words": 4096, "image": 4096, "grammar": 4096, "schema": 4096}


def seeds_of(name: str) -> list[bytes]:
    """Inputs to start from: what is right, and each kind of damage once."""
    if name == "gate":
        language = Language("llama", 400, 32, 1, 32, 2, 2, 64)
        with tempfile.TemporaryDirectory() as folder:
            made = make_random_model(Shape("tiny", language, Vision("mlp", 32, 1, 32, 2, 28, 14)), Path(folder))
            whole = [b"\x00" + made.mmproj.read_bytes(), b"\x01" + made.model.read_bytes()]
        whole += [b"\x00" + tiny_mmproj(projector) for projector in PROJECTORS]
        damaged = [
            data[:1] + kind(__import__("random").Random(0), Gguf(data[1:])) for data in whole[:2] for kind in KINDS
        ]
        return whole + damaged
    if name == "image":
        return [bytes((i * 37 + j * 11) % 251 for j in range(900)) for i in range(8)]
    return list({"words": WORDS, "grammar": GRAMMARS, "schema": SCHEMAS}[name])


def write_seeds(name: str, folder: Path) -> None:
    """One file for each seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds_of(name)):
        (folder / f"seed-{number}").write_bytes(data)


def build_native(place: Path) -> str | None:
    """Compile the harnesses; returns what is missing instead, if anything is."""
    if shutil.which("clang++") is None:
        return "clang++ (Debian: apt-get install clang)"
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    site = sysconfig.get_path("platlib")
    settings = {
        "CMAKE_C_COMPILER": "clang", "CMAKE_CXX_COMPILER": "clang++", "QAP_FUZZ": "ON",
        "QAP_SANITIZE": "address,undefined", "CMAKE_PREFIX_PATH": site,
        "CMAKE_BUILD_RPATH": str(Path(site) / "llama_cpp" / "lib"),
        "QAP_UPSTREAM_VERSION": fetch_upstream.read_pin(ROOT / "native" / "upstream" / "PIN").version,
    }  # fmt: skip
    for command in (
        ["cmake", "-S", str(ROOT / "native" / "tests"), "-B", str(place), *(f"-D{k}={v}" for k, v in settings.items())],
        ["cmake", "--build", str(place), "--parallel", str(os.cpu_count() or 1), "--target"]
        + [f"fuzz-{name}" for name in NATIVE],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": here})
        if done.returncode != 0:
            raise SystemExit(f"coverage_guided: {' '.join(command[:2])} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return None


def command_of(name: str, place: Path) -> list[str]:
    """The words that start a harness."""
    if name in NATIVE:
        return [str(place / "fuzz" / f"fuzz-{name}")]
    return [sys.executable, str(ROOT / "tools" / "fuzz" / "guards.py"), name]


def store(folder: Path, archive: Path) -> None:
    """Pack a folder's files; the same files give the same bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for file in sorted(folder.iterdir()):
            out.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)


def run(name: str, place: Path, seconds: int, keep: bool) -> tuple[bool, str]:
    """Whether nothing was found, and a line about it."""
    grown, finds = place / "grown" / name, place / "finds"
    finds.mkdir(parents=True, exist_ok=True)
    write_seeds(name, grown)
    if (CORPUS / f"{name}.zip").is_file():
        with zipfile.ZipFile(CORPUS / f"{name}.zip") as kept:
            kept.extractall(grown)
    command = command_of(name, place)
    words = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES[name]}", "-rss_limit_mb=2048", "-timeout=10"]
    words += [f"-artifact_prefix={finds}/{name}-", "-print_final_stats=1", str(grown)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, errors="replace", check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        return False, f"FOUND something:\n{said[-3000:]}"
    if keep:
        smallest = grown
        if name in NATIVE:  # Atheris cannot merge: it would have to start itself again
            smallest = place / "smallest" / name
            shutil.rmtree(smallest, ignore_errors=True)
            smallest.mkdir(parents=True)
            merge = [*command, "-merge=1", "-max_len=4096", str(smallest), str(grown)]
            subprocess.run(merge, capture_output=True, check=False)
        store(smallest, CORPUS / f"{name}.zip")
    runs = re.findall(r"number_of_executed_units: (\d+)|Done (\d+)", said)
    edges = re.findall(r"cov: (\d+)", said)
    count = next((a or b for a, b in runs), "?")
    return True, f"{count} inputs, {edges[-1] if edges else '?'} edges, {len(list(grown.iterdir()))} kept, no find"


def main() -> int:
    """Print a line for each harness."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="in all (default 600)")
    parser.add_argument("--only", choices=[*NATIVE, *PYTHON])
    parser.add_argument("--keep", action="store_true", help="store the smallest set with that coverage in the tree")
    parser.add_argument(
        "--seeds", type=Path, metavar="FOLDER", help="write the seeds of the C++ harnesses there, no more"
    )
    args = parser.parse_args()
    if args.seeds is not None:
        for name in NATIVE:
            write_seeds(name, args.seeds / f"fuzz-{name}_seeds")
        return 0
    place = ROOT / "build" / "fuzz"
    names = [args.only] if args.only else [*NATIVE, *PYTHON]
    missing = build_native(place) if set(names) & set(NATIVE) else None
    failed = 0
    for name in names:
        if name in NATIVE and missing is not None:
            print(f"{name}: not run; expected {missing}")
        elif name in PYTHON and importlib.util.find_spec("atheris") is None:
            print(f"{name}: not run; expected atheris (pip install atheris)")
        else:
            ended_well, said = run(name, place, max(1, args.seconds // len(names)), args.keep)
            failed += not ended_well
            print(f"{name}: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
