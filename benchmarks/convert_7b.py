#!/usr/bin/env python3
"""What a conversion costs: seconds and peak resident memory, for a checkpoint of LLaVA-1.5-7B's shape.

    python benchmarks/convert_7b.py [--folder DIR] [--quantize Q4_0] [--small]

Writes a checkpoint of random float16 weights (three shards, about 14 GB) to a new folder in DIR (default: the system's
temporary folder), converts it with `qap-gguf convert` in a process of its own, prints one line of figures, and removes
everything. DIR needs 34 GB free. --small makes a model of the same form with some 40 MB.

Shapes: config.json of llava-hf/llava-1.5-7b-hf (CLIP ViT-L/14 at 336 pixels, Llama 2 7B). Random weights are fine for
time and memory, which do not depend on the values. The peak is the kernel's (ru_maxrss of the child): it counts pages
of mapped files, the checkpoint's among them, as well as allocated memory; the two parts are read from /proc ten times
a second, where there is one.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOM = 34 * 10**9
_PERIOD = 0.1  # seconds between two looks at /proc


@dataclass(frozen=True)
class Shape:
    """Widths and counts of a LLaVA-1.5."""

    n_embd: int = 4096
    n_ff: int = 11008
    n_layer: int = 32
    n_head: int = 32
    n_vocab: int = 32064
    v_embd: int = 1024
    v_ff: int = 4096
    v_layer: int = 24
    v_head: int = 16
    image: int = 336
    patch: int = 14


SMALL = Shape(256, 512, 2, 4, 32064, 64, 128, 3, 4, 56, 14)


def tensors(s: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, as transformers 4 saves them."""
    lm, tower = "language_model.model.", "vision_tower.vision_model."
    out: dict[str, tuple[int, ...]] = {f"{lm}embed_tokens.weight": (s.n_vocab, s.n_embd)}
    for i in range(s.n_layer):
        layer = f"{lm}layers.{i}."
        out |= {f"{layer}self_attn.{name}_proj.weight": (s.n_embd, s.n_embd) for name in "qkvo"}
        out |= {f"{layer}mlp.{name}_proj.weight": (s.n_ff, s.n_embd) for name in ("gate", "up")}
        out[f"{layer}mlp.down_proj.weight"] = (s.n_embd, s.n_ff)
        out |= {f"{layer}{name}_layernorm.weight": (s.n_embd,) for name in ("input", "post_attention")}
    out |= {f"{lm}norm.weight": (s.n_embd,), "language_model.lm_head.weight": (s.n_vocab, s.n_embd)}
    embed = f"{tower}embeddings."
    out |= {
        f"{embed}class_embedding": (s.v_embd,),
        f"{embed}patch_embedding.weight": (s.v_embd, 3, s.patch, s.patch),
        f"{embed}position_embedding.weight": ((s.image // s.patch) ** 2 + 1, s.v_embd),
    }
    rows = {"self_attn.out_proj": (s.v_embd, s.v_embd), "mlp.fc1": (s.v_ff, s.v_embd), "mlp.fc2": (s.v_embd, s.v_ff)}
    rows |= {f"self_attn.{name}_proj": (s.v_embd, s.v_embd) for name in "qkv"}
    matrices = {f"encoder.layers.{i}.{name}": shape for i in range(s.v_layer) for name, shape in rows.items()}
    norms = [f"encoder.layers.{i}.layer_norm{n}" for i in range(s.v_layer) for n in (1, 2)]
    for name, shape in matrices.items():
        out |= {f"{tower}{name}.weight": shape, f"{tower}{name}.bias": shape[:1]}
    for name in [*norms, "pre_layrnorm", "post_layernorm"]:
        out |= {f"{tower}{name}.{part}": (s.v_embd,) for part in ("weight", "bias")}
    for name, width in (("linear_1", s.v_embd), ("linear_2", s.n_embd)):
        projector = f"multi_modal_projector.{name}."
        out |= {f"{projector}weight": (s.n_embd, width), f"{projector}bias": (s.n_embd,)}
    return out


def write_checkpoint(folder: Path, s: Shape, n_shards: int = 3) -> int:
    """Write the checkpoint; return its bytes. Values repeat after some MB: drawing 7 G of them would take longer."""
    folder.mkdir(parents=True)
    pool = (np.random.default_rng(0).standard_normal(1 << 23) * 0.02).astype("<f2").tobytes()
    every = tensors(s)
    total = sum(2 * int(np.prod(shape)) for shape in every.values())
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in every.items():
        if filled > total / n_shards and len(shards) < n_shards:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * int(np.prod(shape))
    places: dict[str, str] = {}
    for number, part in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file_name, part, pool)
        places |= dict.fromkeys(part, file_name)
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    _write_configs(folder, s)
    return sum(path.stat().st_size for path in folder.iterdir())


def _write_shard(path: Path, part: dict[str, tuple[int, ...]], pool: bytes) -> None:
    header, end = {}, 0
    for name, shape in part.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            end -= file.write(pool[: min(len(pool), end)])


def _write_configs(folder: Path, s: Shape) -> None:
    text = {
        "model_type": "llama", "hidden_size": s.n_embd, "intermediate_size": s.n_ff, "num_hidden_layers": s.n_layer,
        "num_attention_heads": s.n_head, "num_key_value_heads": s.n_head, "vocab_size": s.n_vocab,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": s.v_embd, "intermediate_size": s.v_ff,
        "num_hidden_layers": s.v_layer, "num_attention_heads": s.v_head, "image_size": s.image, "patch_size": s.patch,
    }  # fmt: skip
    config = {"model_type": "llava", "text_config": text, "vision_config": vision, "image_token_index": 32000}
    _json(folder / "config.json", config | {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"})
    _json(folder / "preprocessor_config.json", {"do_rescale": True, "rescale_factor": 1 / 255})
    # A vocabulary of the right size: each byte under the letter that GPT-2's tokenizer shows it as, and words.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(n) for n in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    words = ["!!"] + [f"w{i:05}" for i in range(32000 - len(letters) - 1)]
    model = {"type": "BPE", "vocab": {text: i for i, text in enumerate([*letters, *words])}, "merges": ["! !"]}
    added = [{"id": 32000, "content": "<image>", "special": True}]
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    _json(folder / "tokenizer.json", {"model": model, "added_tokens": added, "pre_tokenizer": pre})
    _json(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


class Watch:
    """Peaks of a process's resident memory, allocated (RssAnon) and mapped (RssFile), in bytes; 0 without /proc."""

    def __init__(self, pid: int) -> None:
        self.status = Path(f"/proc/{pid}/status")
        self.anon = self.file = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.done.wait(_PERIOD):
            try:
                found = {k: int(v) << 10 for k, v in re.findall(r"(Rss\w+):\s+(\d+) kB", self.status.read_text())}
            except OSError:
                return
            self.anon = max(self.anon, found.get("RssAnon", 0))
            self.file = max(self.file, found.get("RssFile", 0))

    def stop(self) -> None:
        self.done.set()
        self.thread.join()


def convert(source: Path, out: Path, quantize: str) -> dict[str, float]:
    """Convert in a child; return seconds, peaks and sizes in bytes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "qap_gguf", "convert", str(source), str(out), "--quantize", quantize]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watch = Watch(child.pid)
    try:
        status = child.wait()
    finally:
        child.kill()
        watch.stop()
    if status:
        raise SystemExit(f"the conversion ended with {status}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    made = sum(path.stat().st_size for path in out.iterdir())
    return {
        "seconds": time.perf_counter() - started, "peak": peak, "peak_allocated": watch.anon, "peak_mapped": watch.file,
        "made": made,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run, print, clean up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make the files [default: the temporary folder]")
    parser.add_argument("--quantize", default="Q4_0", help="type of the language model [default: Q4_0]")
    parser.add_argument("--small", action="store_true", help="a model of 30 MB, to see that this works")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="convert-7b-", dir=args.folder) as name:
        folder = Path(name)
        if not args.small and (free := shutil.disk_usage(folder).free) < ROOM:
            print(f"expected {ROOM / 1e9:.0f} GB free in {folder}, got {free / 1e9:.1f} GB; give --folder DIR")
            return 1
        started = time.perf_counter()
        size = write_checkpoint(folder / "checkpoint", SMALL if args.small else Shape())
        print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        found = convert(folder / "checkpoint", folder / "out", args.quantize)
    print(
        f"{args.quantize}: {size / 1e9:.2f} GB to {found['made'] / 1e9:.2f} GB in {found['seconds']:.0f} s; peak "
        f"{found['peak'] / 1e9:.2f} GB resident (allocated {found['peak_allocated'] / 1e9:.2f} GB, pages of mapped "
        f"files {found['peak_mapped'] / 1e9:.2f} GB) on {platform.machine()}, {platform.system()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
