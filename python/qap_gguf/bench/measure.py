"""Passes from the picture to the first token and some further ones, dense and pruned, in turns in one process.

The time to the first token is the wall clock from before the encode to the choice of the first token, and so it holds
what lies between the steps too. Dense and pruned passes take turns, so that a machine that other jobs slow down slows
both, and ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qap_gguf.bench.memory import kv_bytes
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError
from qap_gguf.model import VisionModel
from qap_gguf.vision.images import ImageSource

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        image: the picture.
        configs: how to prune; each must keep a number of tokens of its own, or have an early drop of its own.
        n_text: text tokens of the prompt, those of the chat template among them.
        n_decode: tokens of the answer, at least 1.
        rounds: timed passes of each kind, at least 1; one more goes before, untimed.
    """

    image: ImageSource
    configs: tuple[PruneConfig, ...]
    n_text: int = 40
    n_decode: int = 8
    rounds: int = 5


@dataclass(frozen=True)
class Pass:
    """One pass. Times are wall-clock seconds.

    Attributes:
        n_tokens: image tokens before pruning.
        n_kept: image tokens that the language model read.
        n_text: text tokens of the prompt.
        encode_s, score_s, select_s, prefill_s: the steps.
        first_s: from before the encode to the first token.
        decode_s: for each further token, mean; None where the answer ended at once.
        n_kv: cells of the KV cache after the prefill.
        kv_bytes: their size.
        encoder_keep: part of the tokens that an early drop left.
    """

    n_tokens: int
    n_kept: int
    n_text: int
    encode_s: float
    score_s: float
    select_s: float
    prefill_s: float
    first_s: float
    decode_s: float | None
    n_kv: int
    kv_bytes: int
    encoder_keep: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def run_pass(vlm: VisionModel, image: ImageSource, text: str, config: PruneConfig | None, n_decode: int) -> Pass:
    """Encode, prune (`config` None: keep all), prefill, and answer with `n_decode` tokens."""
    vlm.forget()  # each pass does all the work
    started = time.perf_counter()
    embedding = vlm.encode(image, config)
    answer = vlm.generate([embedding, text], prune=config, max_tokens=n_decode, stream=True)
    int(np.argmax(vlm.last_logits()))  # the first token, chosen greedily
    first = time.perf_counter() - started
    n_kv, size = answer.stats.n_kv, kv_bytes(vlm.language_model)
    for _ in answer:
        pass
    stats = answer.stats
    n_steps = stats.n_kv - n_kv  # the first token comes of the prefill
    return Pass(
        n_tokens=stats.n_image_tokens,
        n_kept=stats.n_image_kept,
        n_text=stats.n_prompt_tokens,
        encode_s=stats.encode_s,
        score_s=stats.score_s,
        select_s=stats.select_s,
        prefill_s=stats.prefill_s,
        first_s=first,
        decode_s=stats.decode_s / n_steps if n_steps else None,
        n_kv=n_kv,
        kv_bytes=size,
        encoder_keep=1.0 if config is None else config.encoder_keep,
    )


def _filler(vlm: VisionModel, n: int) -> str:
    """A text of about `n` tokens, at least one."""
    return "a" + " a" * (n - 1) if _count(vlm, "a a") == 2 else "a" * max(1, n)


def _count(vlm: VisionModel, text: str) -> int:
    return len(vlm.language_model.tokenize(text.encode(), add_bos=False, special=False))


def run_passes(vlm: VisionModel, plan: Plan, progress: Progress | None = None) -> list[list[Pass]]:
    """Run every pass of a plan.

    Args:
        vlm: the model.
        plan: what to measure.
        progress: called as progress(done, total) after each pass.

    Returns:
        One list for each round; in it the dense pass, then one for each config.

    Raises:
        ConfigError: two configs with the same early drop keep the same number of tokens.
        UnsupportedError: the model cannot be pruned, or cuts the picture into tiles that this version cannot join.
    """
    configs: Sequence[PruneConfig | None] = (None, *plan.configs)
    total, done = len(configs) * (plan.rounds + 1), 0

    def one(text: str, config: PruneConfig | None) -> Pass:
        nonlocal done
        result = run_pass(vlm, plan.image, text, config, plan.n_decode)
        done += 1
        if progress is not None:
            progress(done, total)
        return result

    first = one("a", None)  # a warm-up that also says how many tokens the template has
    text = _filler(vlm, plan.n_text - first.n_text + 1)
    counts = [one(text, config).n_kept for config in plan.configs]
    kinds = [(n_kept, config.encoder_keep) for n_kept, config in zip(counts, plan.configs, strict=True)]
    if len(set(kinds)) != len(kinds):
        raise ConfigError(f"n_keep: expected numbers that differ, got {counts}; leave one of them out")
    return [[one(text, config) for config in configs] for _ in range(plan.rounds)]
