#!/usr/bin/env python3
"""Compare our importance matrices with llama-imatrix on a text, for the packaged model and one with experts.

    python tools/build/upstream_imatrix.py                        # compiles llama-imatrix, which takes a minute
    python tools/build/upstream_imatrix.py -m model-F16.gguf --text wiki.txt --ctx 512

llama-imatrix of the pinned sources is built against llama-cpp-python's libraries in a temporary folder. Prints the
largest relative difference of each file's tensors (mean square of a channel, by upstream's); exit status 1 where one is
above 1e-3, or where names or counts differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

import qap_gguf as qap
from qap_gguf.convert.output.imatrix_sums import read_sums
from qap_gguf.eval import measure_imatrix

FETCH = Path(__file__).resolve().with_name("fetch_upstream.py")
#: libllama and ggml that Python uses, then libllama-common, which llama-cpp-python installs beside other copies.
LIBRARIES = (Path(llama_cpp.__file__).parent / "lib", Path(llama_cpp.__file__).parent.parent / "lib")
MOST = 1e-3
TEXT = "The quick brown fox jumps over the lazy dog, twice: 1, 2, 3. What is in row 2, column 4? A house; four boats.\n"
_DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")


def with_experts(model: Path, out: Path, n_experts: int = 4, n_used: int = 2, seed: int = 0) -> Path:
    """A copy of a Llama's file whose MLPs are `n_experts` random ones beside a router, all in F32.

    Facts: src/models/llama.cpp (a Llama with expert_count is Mixtral), gguf-py's names of the tensors.
    """
    reader, dice = gguf.GGUFReader(model), np.random.default_rng(seed)
    writer = gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.types and not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(n_used)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(_DENSE):
            block, name, _ = tensor.name.rsplit(".", 2)
            spread = float(np.std(values))
            many = dice.normal(0, spread, (n_experts, *values.shape)).astype(np.float32)
            writer.add_tensor(f"{block}.{name}_exps.weight", many)
            if name == "ffn_gate":
                router = dice.normal(0, 1, (n_experts, values.shape[1])).astype(np.float32)
                writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
        else:
            writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def compile_program(folder: Path, upstream: list[str]) -> Path:
    """llama-imatrix of the pinned sources."""
    fetched = subprocess.run([sys.executable, str(FETCH), *upstream], stdout=subprocess.PIPE, text=True, check=True)
    tree = Path(fetched.stdout.splitlines()[-1])
    program = folder / "llama-imatrix"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-w", "-DLLAMA_SHARED", "-DGGML_SHARED"]
    command += [f"-I{tree / name}" for name in ("common", "include", "ggml/include", "vendor")]
    command += [str(tree / "tools/imatrix/imatrix.cpp"), "-o", str(program)]
    command += [f"-L{path}" for path in LIBRARIES]
    subprocess.run([*command, "-lllama-common", "-lllama", "-lggml", "-lggml-base", "-lpthread"], check=True)
    return program


def difference(ours: Path, theirs: Path) -> float:
    """The largest relative difference of a channel's mean square; infinite where names or counts differ."""
    left, right = read_sums(ours).entries, read_sums(theirs).entries
    if left.keys() != right.keys():
        print(f"names differ: {sorted(left.keys() ^ right.keys())[:6]}")
        return float("inf")
    worst = 0.0
    for name, (sums, counts) in right.items():
        mine, rows = left[name]
        if not np.array_equal(rows, counts):
            print(f"counts of {name} differ: {rows.ravel()[:8]} and {counts.ravel()[:8]}")
            worst = max(worst, float(np.abs(rows - counts).max() / max(counts.max(), 1)))
        means = [part / np.maximum(n, 1) for part, n in ((mine, rows), (sums, counts))]
        scale = np.maximum(means[1], 1e-6 * float(means[1].max(initial=0)) or 1)
        worst = max(worst, float((np.abs(means[0] - means[1]) / scale).max()))
    return worst


def run(program: Path, model: Path, text: Path, ctx: int, folder: Path) -> float:
    """Measure with both and compare."""
    ours, theirs = folder / f"{model.stem}-ours.gguf", folder / f"{model.stem}-theirs.gguf"
    words: list[Any] = [program, "-m", model, "-f", text, "-o", theirs, "-c", ctx, "-t", 1, "--no-ppl"]
    words += ["-ngl", 0, "-fa", "off"]  # as we load it
    started = time.perf_counter()
    env = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, LIBRARIES))}
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(
            f"expected llama-imatrix to measure {model}, got status {done.returncode}: {done.stderr[-900:]}"
        )
    found = measure_imatrix(text, ours, model=model, text=True, chunk=ctx, n_ctx=ctx, n_threads=1)
    worst = difference(ours, theirs)
    print(
        f"{model.name}: {found.n_entries} tensors, {found.rows['text']} rows, largest relative difference {worst:.1e} "
        f"(seconds: {found.seconds:.1f}, llama-imatrix with loading {seconds:.1f})"
    )
    return worst


def main() -> int:
    """Compile, measure, compare."""
    parser = argparse.ArgumentParser(description="Compare our importance matrices with llama-imatrix.")
    parser.add_argument("-m", "--model", type=Path, help="a language model; default the packaged one, and with experts")
    parser.add_argument("--text", type=Path, help="a text of at least two chunks")
    parser.add_argument("--ctx", type=int, default=128, help="tokens of a chunk")
    parser.add_argument("--upstream-dir", help="an unpacked llama.cpp tree, instead of a download")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qap-imatrix-") as name:
        folder = Path(name)
        program = compile_program(folder, ["--upstream-dir", args.upstream_dir] if args.upstream_dir else [])
        text = args.text or folder / "text.txt"
        if args.text is None:
            text.write_text("".join(f"{number}. {TEXT}" for number in range(60)))
        models = [args.model] if args.model else []
        if not models:
            packaged = qap.packaged_model().model
            models = [packaged, with_experts(packaged, folder / "experts.gguf")]
        worst = max(run(program, model, text, args.ctx, folder) for model in models)
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
