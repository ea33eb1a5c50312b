"""What the guard counts, in the text format of Prometheus; llama-server's own counters follow in /metrics."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

_HELP: Final = {
    "requests_total": "Requests by status.",
    "answers_total": "Answers that were made.",
    "images_total": "Images in answered requests.",
    "image_tokens_total": "Image tokens before pruning.",
    "image_tokens_kept_total": "Image tokens that the language model read.",
    "seconds_total": "Seconds by step: images fetched and decoded, encoded, prefill, answer.",
    "restarts_total": "Times that llama-server did not respond and was started again.",
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

    def add_result(self, result: Mapping[str, Any]) -> None:
        """Count what llama-server says of an answer: its ``timings`` and ``prune`` (native/programs/qap-server.h)."""
        self.add("answers_total")
        timings = result.get("timings") or {}
        self.add("seconds_total", float(timings.get("prompt_ms", 0)) / 1000, 'step="prefill"')
        self.add("seconds_total", float(timings.get("predicted_ms", 0)) / 1000, 'step="answer"')
        told = result.get("prune") or {}
        self.add("seconds_total", float(told.get("encode_ms", 0)) / 1000, 'step="encode"')
        for image in told.get("images", ()):
            self.add("images_total")
            self.add("image_tokens_total", image["n_tokens"])
            self.add("image_tokens_kept_total", image["n_kept"])

    def text(self, n_now: int) -> str:
        """All of it."""
        with self._lock:
            rows = dict(self._counts)
        rows |= {("requests_now", ""): n_now, ("uptime_seconds", ""): round(time.monotonic() - self._started, 3)}
        lines: list[str] = []
        for name, words in _HELP.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP qap_{name} {words}", f"# TYPE qap_{name} {kind}"]
            for label, value in sorted((label, value) for (known, label), value in rows.items() if known == name):
                braces = f"{{{label}}}" if label else ""
                lines.append(f"qap_{name}{braces} {value:.12g}")
        return "\n".join(lines) + "\n"
