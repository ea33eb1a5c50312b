"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Final

from qap_gguf.generation.settings import GenerationStats
from qap_gguf.vision.cache import CacheStats

_HELP: Final = {
    "requests_total": "Requests by status.",
    "images_total": "Images in answered requests.",
    "image_tokens_total": "Image tokens before pruning.",
    "image_tokens_kept_total": "Image tokens that the language model read.",
    "prompt_tokens_total": "Text tokens of prompts.",
    "reused_positions_total": "Positions of prompts that were in the KV cache already.",
    "answers_total": "Answers that were made.",
    "encodes_total": "Passes of the image encoder.",
    "cache_hits_total": "Images found among the encoded ones, by place.",
    "cache_misses_total": "Images that had to be encoded.",
    "cache_bytes": "Bytes of encoded images in memory.",
    "seconds_total": "Seconds by step: images fetched and encoded, scores, selection, prefill, model held.",
    "requests_now": "Requests that are worked on or wait.",
    "uptime_seconds": "Seconds since the start.",
}


class Metrics:
    """Counters, safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._started = time.monotonic()

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        """Add to a counter; `label` is what stands between the braces."""
        with self._lock:
            self._counts[name, label] += value

    def add_answer(self, stats: GenerationStats, n_images: int) -> None:
        """Count what a prompt took."""
        for name, value in (
            ("answers_total", 1),
            ("images_total", n_images),
            ("image_tokens_total", stats.n_image_tokens),
            ("image_tokens_kept_total", stats.n_image_kept),
            ("prompt_tokens_total", stats.n_prompt_tokens),
            ("reused_positions_total", stats.n_reused),
        ):
            self.add(name, value)
        for step in ("score", "select", "prefill"):
            self.add("seconds_total", getattr(stats, step + "_s"), f'step="{step}"')

    def text(self, cache: CacheStats, n_encodes: int, n_now: int) -> str:
        """All of it, with what others count."""
        with self._lock:
            rows = dict(self._counts)
        rows |= {
            ("encodes_total", ""): n_encodes,
            ("cache_hits_total", 'place="memory"'): cache.hits,
            ("cache_hits_total", 'place="folder"'): cache.store_hits,
            ("cache_misses_total", ""): cache.misses,
            ("cache_bytes", ""): cache.n_bytes,
            ("requests_now", ""): n_now,
            ("uptime_seconds", ""): round(time.monotonic() - self._started, 3),
        }
        lines: list[str] = []
        for name, words in _HELP.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP qap_{name} {words}", f"# TYPE qap_{name} {kind}"]
            for label, value in sorted((label, value) for (known, label), value in rows.items() if known == name):
                braces = f"{{{label}}}" if label else ""
                lines.append(f"qap_{name}{braces} {value:.12g}")
        return "\n".join(lines) + "\n"
