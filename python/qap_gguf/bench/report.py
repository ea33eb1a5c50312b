"""From passes to medians, ratios, the bound and a table.

The bound is what a perfect pruner would reach: ``encode + (text + K) * prefill per token``, the encode and the prefill
per token being those of the dense pass of the same round; a pass with an early drop brings its own encode. The bound
knows no cost of scores, and it takes a token of a short prompt to cost as much as one of a long prompt: attention makes
it cost a little less, weights read for few tokens a little more.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qap_gguf.bench.measure import Pass

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
_HEADER = (
    "K", "encoder keep", "encode ms", "score ms", "select ms", "prefill ms", "first token ms", "decode ms/token",
    "KV cells", "KV MB", "peak MB", "prefill x", "first token x", "bound x", "of the bound %",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One number of kept tokens.

    Attributes:
        n_kept: image tokens that the language model read; all of them in the dense row.
        is_dense: whether this is the dense row.
        encode_ms, score_ms, select_ms, prefill_ms, first_ms: medians over the rounds.
        decode_ms: for a token, median; None where no answer had any.
        n_kv, kv_bytes: cells of the KV cache after the prefill, and their size.
        peak_bytes: peak of the resident memory of a fresh process that answers so once; None where not measured.
        prefill_speedup, first_speedup: dense / pruned, median of the ratios of each round.
        first_speedup_range: lowest and highest ratio of a round.
        bound_ms, bound_speedup: see above; medians.
        of_bound: first_speedup / bound_speedup, median over the rounds.
        encoder_keep: part of the tokens that an early drop left, 1 without one.
    """

    n_kept: int
    is_dense: bool
    encode_ms: float
    score_ms: float
    select_ms: float
    prefill_ms: float
    first_ms: float
    decode_ms: float | None
    n_kv: int
    kv_bytes: int
    peak_bytes: int | None
    prefill_speedup: float
    first_speedup: float
    first_speedup_range: tuple[float, float]
    bound_ms: float
    bound_speedup: float
    of_bound: float
    encoder_keep: float = 1.0


@dataclass(frozen=True)
class BenchReport:
    """All rows, the dense one first, and what they have in common.

    Attributes:
        rows: dense, then by falling K and falling encoder_keep.
        n_tokens: tokens of the image.
        n_text: text tokens of the prompt.
        rounds: passes behind each median.
    """

    rows: Sequence[Row]
    n_tokens: int
    n_text: int
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "n_tokens": self.n_tokens,
            "n_text": self.n_text,
            "rounds": self.rounds,
            "rows": [asdict(row) for row in self.rows],
        }

    def table(self) -> Table:
        """Return (header, rows)."""
        return _HEADER, [_cells(row) for row in self.rows]


def _cells(row: Row) -> tuple[str, ...]:
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
    cells = (
        f"{row.n_kept}{' (dense)' if row.is_dense else ''}",
        "-" if row.encoder_keep == 1 else f"{row.encoder_keep:g}",
        *(f"{ms:.1f}" for ms in (row.encode_ms, row.score_ms, row.select_ms, row.prefill_ms, row.first_ms)),
        "-" if row.decode_ms is None else f"{row.decode_ms:.1f}",
        str(row.n_kv),
        f"{row.kv_bytes / 1e6:.1f}",
        peak,
    )
    if row.is_dense:
        return (*cells, "1", "1", "1", "-")
    speedups = (row.prefill_speedup, row.first_speedup, row.bound_speedup)
    return (*cells, *(f"{x:.2f}" for x in speedups), f"{100 * row.of_bound:.1f}")


def _bound_s(dense: Pass, one: Pass) -> float:
    """Seconds to the first token if nothing cost but the encode and the dense prefill's share of each token."""
    per_token = dense.prefill_s / (dense.n_text + dense.n_kept)
    encode_s = dense.encode_s if one.encoder_keep == 1 else one.encode_s
    return encode_s + (one.n_text + one.n_kept) * per_token


def _row(passes: Sequence[Pass], denses: Sequence[Pass], is_dense: bool, peak: int | None) -> Row:
    def median_ms(name: str) -> float:
        return 1000 * float(statistics.median(getattr(one, name) for one in passes))

    pairs = list(zip(denses, passes, strict=True))
    first = [dense.first_s / one.first_s for dense, one in pairs]
    bounds = [(dense.encode_s + dense.prefill_s) / _bound_s(dense, one) for dense, one in pairs]
    decodes = [one.decode_s for one in passes if one.decode_s is not None]
    return Row(
        n_kept=passes[0].n_kept,
        is_dense=is_dense,
        encode_ms=median_ms("encode_s"),
        score_ms=median_ms("score_s"),
        select_ms=median_ms("select_s"),
        prefill_ms=median_ms("prefill_s"),
        first_ms=median_ms("first_s"),
        decode_ms=1000 * statistics.median(decodes) if decodes else None,
        n_kv=passes[0].n_kv,
        kv_bytes=passes[0].kv_bytes,
        peak_bytes=peak,
        prefill_speedup=statistics.median(dense.prefill_s / one.prefill_s for dense, one in pairs),
        first_speedup=statistics.median(first),
        first_speedup_range=(min(first), max(first)),
        bound_ms=1000 * statistics.median(_bound_s(dense, one) for dense, one in pairs),
        bound_speedup=statistics.median(bounds),
        of_bound=statistics.median(got / bound for got, bound in zip(first, bounds, strict=True)),
        encoder_keep=passes[0].encoder_keep,
    )


def summarise(rounds: Sequence[Sequence[Pass]], peaks: Sequence[int | None] | None = None) -> BenchReport:
    """Summarise what :func:`qap_gguf.bench.run_passes` returned.

    Args:
        rounds: at least one; the dense pass first in each.
        peaks: peak memory in bytes of each pass of a round, see :func:`qap_gguf.bench.peak_bytes`.
    """
    columns = list(zip(*rounds, strict=True))
    denses = columns[0]
    known = [None] * len(columns) if peaks is None else list(peaks)
    rows = [_row(column, denses, column is denses, peak) for column, peak in zip(columns, known, strict=True)]
    rows[1:] = sorted(rows[1:], key=lambda row: (-row.n_kept, -row.encoder_keep))
    return BenchReport(rows, denses[0].n_tokens, denses[0].n_text, len(rounds))
