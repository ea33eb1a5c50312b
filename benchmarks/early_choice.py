#!/usr/bin/env python3
"""Where an early drop loses answers: dino-vl in torch, half of its patches gone after a layer, by several choices.

    python benchmarks/early_choice.py dino-vl large/questions.jsonl --limit 512

A row is CHOICE:LAYER:FINAL. CHOICE says which patches layers after LAYER see:

- none: all, no drop;
- best: those with the highest S, as `encoder_keep` does it; block2, block4: the same number of best ones in each block
  of 2 x 2 or 4 x 4; grid: every other patch; covering, covering-centred: `coverage` over the hidden states, as they are
  or minus their mean;
- oracle: those that would be kept in the end if nothing were dropped, then the best. No encoder can know these.

FINAL says how K of what is left are chosen: left, by `coverage` among what is left; all, by `coverage` that counts what
was dropped as well, as the package does it (docs/method.md, section 9); oracle, those that would be kept if nothing
were dropped.

The tower runs in float32 in torch, the language model as in w4a4.py without rounding; scores are the package's. In
brackets the kinds of questions at, color, count, is and where.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

import qap_gguf as qap
from qap_gguf.eval import Question, load_questions, markdown
from w4a4 import Shown, TorchModel

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]
KINDS: Final = ("at", "color", "count", "is", "where")
ROWS: Final = (
    "none", "oracle:3:oracle", "best:3:left", "best:3:all", "block2:3:all", "block4:3:all", "grid:3:all",
    "covering:3:all", "covering-centred:3:all", "best:6:left", "best:6:all", "best:9:left", "best:9:all",
)  # fmt: skip
CONFIG: Final = qap.PruneConfig(select="coverage")


@dataclass(frozen=True)
class Halfway:
    """What is known of a picture's N patches after a layer.

    Attributes:
        hidden: the layer's output, (N, d).
        total: S of docs/method.md, section 9, (N,).
        wanted: what would be kept in the end if nothing were dropped, ascending.
    """

    hidden: Floats
    total: Floats
    wanted: Indices


def best(total: Floats, n: int) -> Indices:
    """The n largest, ascending; the first of equal ones."""
    return np.sort(np.argsort(-total, kind="stable")[:n]).astype(np.int32)


def best_of_blocks(total: Floats, n: int, side: int) -> Indices:
    """The n largest by their rank in their block of `side` x `side`, then by themselves.

    Example:
        >>> best_of_blocks(np.arange(16, dtype="float32"), 4, 2).tolist()
        [5, 7, 13, 15]
    """
    width = round(len(total) ** 0.5)
    numbers = np.arange(len(total)).reshape(width // side, side, width // side, side)
    rank = np.empty(len(total))
    for block in numbers.transpose(0, 2, 1, 3).reshape(-1, side * side):
        rank[block[np.argsort(-total[block], kind="stable")]] = np.arange(side * side)
    return np.sort(np.lexsort((-total, rank))[:n]).astype(np.int32)


def covering(known: Halfway, n: int, *, centred: bool) -> Indices:
    """What `coverage` keeps of the hidden states."""
    hidden = known.hidden - known.hidden.mean(axis=0) if centred else known.hidden
    return qap.select(known.total, n, features=np.ascontiguousarray(hidden), method="coverage")


def every_other(known: Halfway, n: int) -> Indices:
    """A chessboard: every other patch of each line."""
    width = round(len(known.total) ** 0.5)
    line, column = np.divmod(np.arange(len(known.total)), width)
    return np.flatnonzero((line + column) % 2 == 0)[:n].astype(np.int32)


def with_wanted(known: Halfway, n: int) -> Indices:
    """What will be wanted, and the best of the others."""
    total = known.total.copy()
    total[known.wanted] += 2.0  # S is in 0..1
    return best(total, n)


CHOICES: Final[dict[str, Callable[[Halfway, int], Indices]]] = {
    "best": lambda known, n: best(known.total, n),
    "block2": lambda known, n: best_of_blocks(known.total, n, 2),
    "block4": lambda known, n: best_of_blocks(known.total, n, 4),
    "grid": every_other,
    "covering": lambda known, n: covering(known, n, centred=False),
    "covering-centred": lambda known, n: covering(known, n, centred=True),
    "oracle": with_wanted,
}


@dataclass(frozen=True)
class Left:
    """What the last layer leaves of a picture.

    Attributes:
        known: of all patches, when some were dropped.
        kept: which ones were not, (n_left,), ascending.
        total: their scores in the end, (n_left,).
        tokens: what the language model would get of them, (n_left, n_embd).
        wanted: what would be kept if nothing had been dropped, ascending.
    """

    known: Halfway
    kept: Indices
    total: Floats
    tokens: Floats
    wanted: Indices


def counting_the_dropped(left: Left, n: int) -> Indices:
    """`coverage`, where what was dropped has to be stood for too."""
    known = left.known
    dropped = np.setdiff1d(np.arange(len(known.total)), left.kept)
    if len(dropped) == 0:
        return FINALS["left"](left, n)
    hidden = known.hidden - known.hidden.mean(axis=0)
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    others = known.total[dropped], hidden[left.kept] @ hidden[dropped].T
    return qap.reference.select(left.total, n, "coverage", features=left.tokens, dropped=others)


#: Each gives the places of the n that are kept among what is left, ascending.
FINALS: Final[dict[str, Callable[[Left, int], Indices]]] = {
    "left": lambda left, n: qap.select(left.total, n, features=left.tokens, method="coverage"),
    "all": counting_the_dropped,
    "oracle": lambda left, n: np.searchsorted(left.kept, left.wanted).astype(np.int32),
}


class Tower:
    """dino-vl's tower and projector, layer by layer."""

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        load = transformers.InternVLForConditionalGeneration.from_pretrained
        self._model: Any = load(checkpoint, dtype=torch.float32).eval().model
        said = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
        self._mean, self._deviation = (torch.tensor(said[key])[:, None, None] for key in ("image_mean", "image_std"))

    def start(self, path: Path) -> Any:
        """The input of the first layer, (1, 1 + N, d): the class token comes first."""
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
        out = self._model.vision_tower.embeddings(((pixels - self._mean) / self._deviation)[None])
        return out[0] if isinstance(out, tuple) else out

    def layers(self, hidden: Any, first: int, last: int) -> tuple[Any, Floats]:
        """The output of layers `first` to `last` - 1, and the class token's attention in the last of them, (n,)."""
        attention = np.empty(0, np.float32)
        for number in range(first, last):
            layer = self._model.vision_tower.encoder.layer[number]
            if number == last - 1:
                attention = self._of_class(layer, hidden)
            hidden = layer(hidden)
        return hidden, attention

    @property
    def n_layers(self) -> int:
        """Layers of the tower."""
        return len(self._model.vision_tower.encoder.layer)

    def tokens(self, hidden: Any) -> Floats:
        """What the language model gets, (n, n_embd)."""
        out = self._model.multi_modal_projector(self._model.vision_tower.layernorm(hidden)[:, 1:])
        made: Floats = np.ascontiguousarray(out[0].numpy())
        return made

    @staticmethod
    def _of_class(layer: Any, hidden: Any) -> Floats:
        part, x = layer.attention, layer.layernorm_before(hidden)[0]
        q, k = (norm(of(x)).unflatten(-1, (part.num_heads, part.head_dim))
                for norm, of in ((part.q_norm, part.q_proj), (part.k_norm, part.k_proj)))  # fmt: skip
        weights = (torch.einsum("hd,nhd->hn", q[0], k) * part.scale).softmax(-1).mean(0)[1:]
        found: Floats = weights.numpy()
        return found


def early_total(attention: Floats, hidden: Floats) -> Floats:
    """S of section 9: the logarithm of attention leads."""
    logs = np.log(np.maximum(attention, 1e-6 / (len(attention) + 1))).astype(np.float32)
    return qap.score(hidden, CONFIG, semantic=logs).total


class Pictures:
    """What the language model reads of a picture in each row, for each K."""

    def __init__(self, tower: Tower, rows: Sequence[str], budgets: Sequence[int], part: float) -> None:
        self._tower, self._rows, self._budgets, self._part = tower, rows, budgets, part

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def shown(self, path: Path) -> dict[tuple[str, int], Shown]:
        """(row, K) -> the kept tokens."""
        start, last = self._tower.start(path), self._tower.n_layers
        hidden, attention = self._tower.layers(start, 0, last)
        whole = self._tower.tokens(hidden)
        total = qap.score(whole, CONFIG, semantic=attention).total
        wanted = {n: qap.select(total, n, features=whole, method="coverage") for n in self._budgets}
        out: dict[tuple[str, int], Shown] = {}
        halves: dict[str, tuple[Any, Halfway]] = {}  # layer -> its output; rows share it
        for row in self._rows:
            choice, layer, final = (*row.split(":"), "", "")[:3]
            if choice == "none":
                out |= {(row, n): Shown(whole[at], at, len(whole)) for n, at in wanted.items()}
                continue
            if layer not in halves:
                half, attention = self._tower.layers(start, 0, int(layer))
                patches = np.ascontiguousarray(half[0, 1:].numpy())
                halves[layer] = half, Halfway(patches, early_total(attention, patches), wanted[max(wanted)])
            half, known = halves[layer]
            kept = CHOICES[choice](known, int(np.ceil(self._part * len(whole))))
            hidden = torch.cat([half[:, :1], half[:, 1:][:, torch.from_numpy(kept).long()]], dim=1)
            hidden, attention = self._tower.layers(hidden, int(layer), last)
            tokens = self._tower.tokens(hidden)
            left = qap.score(tokens, CONFIG, semantic=attention).total
            for n in self._budgets:
                places = FINALS[final](Left(known, kept, left, tokens, wanted[n]), n)
                out[row, n] = Shown(tokens[places], kept[places], len(whole))
        return out


def cell(found: Sequence[tuple[Question, bool]]) -> str:
    """Per cent right, in brackets by kind."""

    def percent(kind: str | None) -> float:
        asked = [right for question, right in found if kind in (None, question.kind)]
        return 100 * sum(asked) / len(asked) if asked else float("nan")

    return f"{percent(None):.1f} ({' '.join(f'{percent(kind):.0f}' for kind in KINDS)})"


def main() -> None:
    """Run every row on every question; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="the folder of dino-vl")
    parser.add_argument("data", type=Path, help="questions about large scenes")
    parser.add_argument("--rows", default=",".join(ROWS), help="CHOICE:LAYER:FINAL, with commas (default: all of docs)")
    parser.add_argument("--part", type=float, default=0.5, help="of the patches that stay (default: 0.5)")
    parser.add_argument("--n-keep", default="64,32,16", metavar="LIST")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, budgets = args.rows.split(","), [int(n) for n in args.n_keep.split(",")]
    pictures = Pictures(Tower(args.checkpoint), rows, budgets, args.part)
    model = TorchModel(args.checkpoint, "W32A32")
    found: dict[tuple[str, int], list[tuple[Question, bool]]] = {(row, n): [] for row in rows for n in budgets}
    path, shown = None, {}
    for number, question in enumerate(load_questions(args.data, args.limit)):
        if question.image != path:
            path, shown = question.image, pictures.shown(question.image)
        for n in budgets:
            said = model.answer(question.text, [shown[row, n] for row in rows])
            for row, text in zip(rows, said, strict=True):
                found[row, n].append((question, bool(question.score(text))))
        if number % 100 == 99:
            print(f"{number + 1} questions", file=sys.stderr, flush=True)
    body = [(row, *(cell(found[row, n]) for n in budgets)) for row in rows]
    print(markdown((("patches", *(f"K = {n}" for n in budgets)), body)))


if __name__ == "__main__":
    main()
