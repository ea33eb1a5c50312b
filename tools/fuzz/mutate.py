#!/usr/bin/env python3
"""Load damaged model files, each in a process of its own, and count what becomes of them.

    python tools/fuzz/mutate.py --n 2000          # counts on stdout; exit 1 if a process was lost
    python tools/fuzz/mutate.py --only 1234       # one mutation again, with what it said

Each child reads one damaged file beside the other, good one, encodes the packaged picture and lets the language model
read it and answer two tokens. Half of the damaged mmproj files go through llama-cpp-python's own chat handler. With
--projectors, mmproj files of the other projectors (tiny_mmproj.py) take the place of the packaged one. A child
ends by: refused (an error of qap_gguf, or a Python exception from the stock handler), ran, another exception, or lost
(a signal, one for 60 s of processor time among them; see process_limits.py).
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf_mutations import KINDS, Gguf, write
from process_limits import bound, ending
from tiny_mmproj import PROJECTORS, tiny_mmproj

RAN, REFUSED, OTHER = 0, 10, 11
SECONDS = 60  # of processor time for a child; more is a loss


def with_axes(model: Path, target: Path) -> Path:
    """A relabelled language model as one with M-RoPE of its own, which HunyuanVL's encoder must have beside it."""
    file = Gguf(model.read_bytes())
    target.write_bytes(write([key for key in file.keys if key.name != b"qap.origin.architecture"], file.tensors))
    return target


def use_pair(mmproj: Path, model: Path) -> None:
    """Load, encode, prefill and answer through VisionModel."""
    import qap_gguf as qap

    with qap.VisionModel(mmproj, model, n_ctx=256, n_threads=1) as vlm:
        image = vlm.encode(qap.packaged_model().sample)
        prune = None if vlm.why_not_prunable else qap.PruneConfig(n_keep=18)
        vlm.generate([image, "How many?"], prune=prune, max_tokens=2)


def use_tiles(mmproj: Path, model: Path) -> None:
    """Load and encode every tile: the public call refuses a picture that is cut into several."""
    import qap_gguf as qap
    from qap_gguf import _core
    from qap_gguf.errors import NativeError
    from qap_gguf.vision.images import load_image

    with qap.VisionModel(mmproj, model, n_ctx=256, n_threads=1) as vlm:
        native = vlm._encoder._native
        try:
            chunks = native.tokenize(_core.media_marker(), [load_image(qap.packaged_model().sample)], False, True)
            for chunk in chunks:
                if chunk.is_image:
                    native.encode(chunk, False)
        except (ValueError, RuntimeError) as err:
            raise NativeError(str(err)) from err


def qap_prunes(mmproj: Path) -> bool:
    """Whether the file was a LLaVA: others run dense through the handler."""
    return not any(name in mmproj.name for name in PROJECTORS)


def use_handler(mmproj: Path, model: Path) -> None:
    """The same through the stock handler, which has the patched libmtmd and no other part of us."""
    import llama_cpp
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    import qap_gguf as qap

    if qap_prunes(mmproj):
        qap.set_default(qap.PruneConfig(n_keep=18))
    url = "data:image/png;base64," + base64.b64encode(qap.packaged_model().sample.read_bytes()).decode()
    handler = Llava15ChatHandler(clip_model_path=str(mmproj), verbose=False)
    llama = llama_cpp.Llama(str(model), chat_handler=handler, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many?"}]
    messages: Any = [{"role": "user", "content": parts}]
    llama.create_chat_completion(messages, max_tokens=2)


def child(use: str, mmproj: Path, model: Path, log: Path) -> int:
    """What a forked process does; its outcome is its exit status."""
    with log.open("wb", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    bound(SECONDS)
    from qap_gguf.errors import QapError

    try:
        {"handler": use_handler, "tiles": use_tiles, "pair": use_pair}[use](mmproj, model)
    except QapError as err:
        sys.stderr.write(f"refused: {err}\n")
        return REFUSED if "\n" not in str(err) else OTHER
    except Exception as err:
        traceback.print_exc()
        # the stock handler's errors are llama-cpp-python's own; so is what it does with a file it cannot read
        return REFUSED if use == "handler" and not isinstance(err, UnicodeDecodeError) else OTHER
    return RAN


class Case:
    """One mutation, made from its number alone."""

    def __init__(self, number: int, seed: int, projectors: bool = False) -> None:
        turn, kind = divmod(number, len(KINDS))
        self.number = number
        self.kind = KINDS[kind]
        if projectors:
            self.target = list(PROJECTORS)[turn % len(PROJECTORS)]
            self.use = "handler" if (turn // len(PROJECTORS)) % 2 == 0 else "tiles"
        else:
            self.target = "mmproj" if turn % 2 == 0 else "model"
            self.use = "handler" if turn % 4 == 2 else "pair"
        self.rng = random.Random(f"{seed}/{number}")

    def __str__(self) -> str:
        return f"{self.number} {self.target} {self.kind.__name__} ({self.use})"


def outcomes(
    numbers: list[int], seed: int, jobs: int, folder: Path, projectors: bool = False
) -> Iterator[tuple[Case, str, str]]:
    """(case, what became of it, what it said) of each number; `jobs` children at a time."""
    import qap_gguf as qap  # in the parent: the children inherit it and start at once
    from qap_gguf.convert.relabel import relabel

    files = qap.packaged_model()
    # as a llama: what most files are, and the stock handler's
    good = {"mmproj": files.mmproj, "model": relabel(files.model, folder / "plain.gguf", undo=True)}
    axes = with_axes(files.model, folder / "axes.gguf")
    whole = {name: path.read_bytes() for name, path in good.items()}
    apart = {name: Gguf(data) for name, data in (whole | {name: tiny_mmproj(name) for name in PROJECTORS}).items()}
    running: dict[int, tuple[Case, Path, Path]] = {}
    waiting = list(reversed(numbers))
    while waiting or running:
        while waiting and len(running) < jobs:
            case = Case(waiting.pop(), seed, projectors)
            damaged, log = folder / f"{case.number}-{case.target}.gguf", folder / f"{case.number}.log"
            damaged.write_bytes(case.kind(case.rng, apart[case.target]))
            pair = {**good, "model" if case.target == "model" else "mmproj": damaged}
            pair |= {"model": axes} if case.target == "hunyuanvl" else {}
            pid = os.fork()
            if pid == 0:
                status = OTHER
                try:
                    status = child(case.use, pair["mmproj"], pair["model"], log)
                finally:
                    os._exit(status)  # no clean-up of what belongs to the parent
            running[pid] = (case, damaged, log)
        pid = next(iter(running))
        _, status = os.waitpid(pid, 0)  # not wait(): the caller may have other children
        case, damaged, log = running.pop(pid)
        said = log.read_text(errors="replace") if log.exists() else ""
        damaged.unlink()
        log.unlink(missing_ok=True)
        names = {RAN: "ran", REFUSED: "refused"}
        if os.WIFSIGNALED(status):
            yield case, f"lost ({ending(status)})", said
        else:
            yield case, names.get(os.WEXITSTATUS(status), "other exception"), said


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="mutations (default 200)")
    parser.add_argument("--only", type=int, action="append", help="this mutation alone, with what it said; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--projectors", action="store_true", help="damage mmproj files of the other projectors")
    parser.add_argument("--json", action="store_true", help="counts by kind of mutation, as JSON")
    args = parser.parse_args()
    numbers = args.only if args.only else list(range(args.n))
    counts: collections.Counter[str] = collections.Counter()
    by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        for case, outcome, said in outcomes(numbers, args.seed, args.jobs, Path(folder), args.projectors):
            counts[outcome.split()[0]] += 1
            by_kind[case.kind.__name__][outcome.split()[0]] += 1
            if args.only or outcome.startswith(("lost", "other")):
                print(f"{case}: {outcome}\n{said[-3000:]}", file=sys.stderr)
    if args.json:
        print(json.dumps({"tried": len(numbers), **counts, "kinds": by_kind}, indent=1))
    else:
        each = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
        print(f"{len(numbers)} mutations: {each}; {counts['lost']} processes lost to a signal")
    return 1 if counts["lost"] or counts["other"] else 0


if __name__ == "__main__":
    sys.exit(main())
