#!/usr/bin/env python3
"""Give files of every architecture and projector, at odds with themselves, to what judges them, and count the ends.

    python tools/fuzz/strangers.py --n 2000     # counts on stdout; exit 1 if a process was lost
    python tools/fuzz/strangers.py --only 17    # one file again, with what was said

A file is the packaged language model, as a llama and with a short vocabulary, or a tiny mmproj, under the name of
another architecture or projector, with a few keys that such models have, and one damage of gguf_mutations.py. It is
judged as `annotate`, `check_files` and the commands do it: gate, trial, then, in a process of its own, the loading
and a question about a picture. It ends by: gate (a rule of ours), trial (the child was ended; the parent says so in a
line), words (llama.cpp's own error), ran, or lost (a signal in the process that the trial was to protect;
process_limits.py says what it may take).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import struct
import sys
import tempfile
import traceback
from pathlib import Path

import gguf_mutations as damage
from gguf_mutations import ARRAY, STRING, Gguf, Key, Tensor, write
from process_limits import bound, ending
from tiny_mmproj import PROJECTORS, tiny_mmproj

KINDS = (
    damage.change_key, damage.change_key_type, damage.drop_key, damage.add_key,
    damage.drop_tensor, damage.change_shape, damage.change_type, damage.swap_tensors,
)  # fmt: skip
N_TOKENS = 400
SECONDS = 90  # of processor time for a process; more is a loss
#: what other architectures ask for, as it follows the name and a dot
MORE_KEYS = (
    "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count", "expert_count",
    "expert_used_count", "expert_shared_count", "expert_feed_forward_length", "leading_dense_block_count",
    "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.dimension_count", "wkv.head_size",
    "full_attention_interval", "interleave_moe_layer_step", "embedding_length_per_layer_input", "expert_group_count",
    "expert_group_used_count", "attention.head_count_kv", "nextn_predict_layers", "shortconv.l_cache",
)  # fmt: skip


def short_model(file: Gguf) -> Gguf:
    """The packaged language model with its first tokens only."""
    keys = []
    for key in file.keys:
        item, n = struct.unpack_from("<IQ", key.value) if key.kind == ARRAY else (0, 0)
        if key.name.startswith(b"tokenizer.") and n > N_TOKENS:
            at = 12
            for _ in range(N_TOKENS):
                at += 8 + struct.unpack_from("<Q", key.value, at)[0] if item == STRING else 4
            value = struct.pack("<IQ", item, N_TOKENS) + key.value[12:at]
            keys.append(Key(key.name, ARRAY, value, 0))
        elif not key.name.endswith(b"token_id"):
            keys.append(key)
    tensors = [
        Tensor(t.name, [t.dims[0], N_TOKENS] if t.dims[-1] > 40_000 else t.dims, t.kind, t.data, 0)
        for t in file.tensors
    ]
    return Gguf(write(keys, tensors))


def named(file: Gguf, name: str, kind: str) -> Gguf:
    """The file under another name."""
    value = struct.pack("<Q", len(name)) + name.encode()
    own = {"model": b"general.architecture", "mmproj": b"clip.projector_type"}[kind]
    keys = [Key(key.name, key.kind, value if key.name == own else key.value, 0) for key in file.keys]
    if kind == "model":
        keys = [Key(key.name.replace(b"llama.", name.encode() + b"."), key.kind, key.value, 0) for key in keys]
    return Gguf(write(keys, file.tensors))


def renamed(rng: random.Random, file: Gguf, name: str, kind: str) -> Gguf:
    """The same; a language model gets some of the keys of others."""
    file = named(file, name, kind)
    keys = file.keys
    if kind == "model":
        for more in rng.sample(MORE_KEYS, rng.choice((0, 2, 6, 12))):
            full = f"{name}.{more}".encode()
            number = struct.pack("<I", rng.choice((0, 1, 2, 3, 4, 7, 16, 64, 65535)))
            keys = [*[key for key in keys if key.name != full], Key(full, 4, number, 0)]
    return Gguf(write(keys, file.tensors))


def names() -> list[tuple[str, str]]:
    """(kind, name) of everything that gguf-py knows."""
    import gguf

    models = [("model", name) for name in gguf.MODEL_ARCH_NAMES.values() if name not in ("clip", "mmproj")]
    visions = {v for k, v in vars(gguf.VisionProjectorType).items() if k.isupper() and isinstance(v, str)}
    return sorted(models) + sorted(("mmproj", name) for name in visions)


def judge(kind: str, path: Path) -> str:
    """What a forked process does: how the file ends, in a word and what was said."""
    import qap_gguf as qap
    from qap_gguf.errors import ModelFileError, QapError
    from qap_gguf.files.gguf import check_language, check_mmproj
    from qap_gguf.files.trial import check_trial

    files = qap.packaged_model()
    with contextlib.suppress(QapError):  # its words are the gate's, which follow
        qap.annotate(path, path.with_name("annotated.gguf"), qap.PruneConfig(), force=True)
    try:
        (check_mmproj if kind == "mmproj" else check_language)(path)
    except ModelFileError as err:
        return f"gate: {err}"
    pair = (path, files.model) if kind == "mmproj" else (files.mmproj, path)
    try:
        check_trial(*pair)
    except ModelFileError as err:
        return f"trial: {err}"
    try:
        with qap.VisionModel(*pair, n_ctx=1024, n_threads=1, check="none") as vlm:
            vlm.generate([vlm.encode(files.sample), "How many?"], max_tokens=2)
    except QapError as err:
        return f"words: {err}"
    return "ran"


def outcome(kind: str, path: Path, log: Path) -> str:
    """The same in a process of its own; "lost" where that is ended."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            bound(SECONDS)
            with log.open("wb", buffering=0) as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            log.with_suffix(".said").write_text(judge(kind, path))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status:
        return f"lost: {ending(status)}\n{log.read_text(errors='replace')[-2000:]}"
    return log.with_suffix(".said").read_text()


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="files (default 200)")
    parser.add_argument("--only", type=int, action="append", help="this file alone, with what was said; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import qap_gguf as qap  # in the parent: the children inherit it and start at once
    from qap_gguf.convert.relabel import relabel

    mmprojs = [Gguf(tiny_mmproj(name)) for name in PROJECTORS]
    everything = names()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QAP_CACHE"] = folder
        plain = relabel(qap.packaged_model().model, Path(folder) / "plain.gguf", undo=True)
        model = short_model(Gguf(plain.read_bytes()))
        for number in args.only or range(args.n):
            kind, name = everything[number % len(everything)]
            rng = random.Random(f"{args.seed}/{number}")
            file = renamed(rng, model if kind == "model" else rng.choice(mmprojs), name, kind)
            path = Path(folder) / "file.gguf"
            whole = number // len(everything) == 0  # the first round: contradictory by its name alone
            path.write_bytes(file.whole if whole else rng.choice(KINDS)(rng, file))
            said = outcome(kind, path, Path(folder) / "log")
            counts[said.partition(":")[0]] += 1
            if args.only or said.startswith("lost"):
                print(f"{number} {kind} {name}: {said}", file=sys.stderr)
    each = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    print(f"{sum(counts.values())} files of {len(everything)} architectures and projectors: {each}")
    return 1 if counts["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
