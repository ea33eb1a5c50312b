"""What the demonstration models are taught besides answers: where to look, and what to find there.

"Is there a dog?" needs several steps at once: match the name with the patches, note what was found, carry it to the
end of the question. Answers alone teach none of them, for each is worth nothing without the others: after hours of
training such questions were answered by chance. So each step has a lesson of its own, and then 100 steps are enough:

- search: in layer 1 the first head looks from the name to the cells of the object, and at no patch if there is none;
- carry: in layer 2 the first head looks from where the answer is said to the name;
- found: two linear readers at the name, of that head and of layer 1's output, can tell whether it is there, and its row
  and column;
- places: two linear readers of the patches, of the projector's output and of layer 1's input, can tell row and column
  (and object and background, where the tower learns too). Patches that show an object count four times: a pretrained
  tower's patches of an object know far less of their place than those of the background.

The readers are thrown away after training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

import demo_forward
from demo_questions import IGNORED, Asked, Packed, Tokenize, pack, texts_in_use
from emoji_scenes import COLORS, EMOJI, GRID, Scene

#: How much each lesson weighs where a model says nothing else; answers weigh 1.
WEIGHTS: Final = {"search": 0.4, "carry": 0.2, "found": 0.3, "places": 0.3, "inside": 0.3}
_OTHERS = 1024  # words that are wrong always, drawn anew for each step


def tokenizer_of(checkpoint: Path) -> Tokenize:
    """text -> tokens by the checkpoint's tokenizer; texts repeat, so they are remembered."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint)

    @cache
    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    return lambda text: list(tokens(text))


def cells_of(side: int) -> Any:
    """The cell of each patch of a picture of `side` x `side` patches, int64 (side * side,)."""
    at = torch.arange(side * side)
    return (at // side * GRID // side) * GRID + at % side * GRID // side


def pixel_values(scenes: Sequence[Scene], mean: Sequence[float], deviation: Sequence[float]) -> Any:
    """What a tower reads: float32 (b, 3, h, w), each channel less its mean and over its deviation."""
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    means, deviations = (torch.tensor(some)[:, None, None] for some in (mean, deviation))
    return (pixels - means) / deviations


class Words:
    """The rows of an embedding table that are in use: only they train, and the softmax is over them and some others."""

    def __init__(self, table: Any, tokenize: Tokenize, extra: Sequence[str]) -> None:
        used = sorted({token for text in [*texts_in_use(), *extra] for token in tokenize(text)})
        self.table, self.used = table.detach(), torch.tensor(used)
        self.rows = nn.Parameter(self.table[self.used].clone())
        self._row = torch.full((len(table),), -1)
        self._row[self.used] = torch.arange(len(used))
        free = torch.ones(len(table), dtype=torch.bool)
        free[self.used] = False
        self._others = free.nonzero()[:, 0]

    def embed(self, tokens: Any) -> Any:
        """Tokens, any shape (...) -> (..., d)."""
        return F.embedding(self._row[tokens], self.rows)

    def targets(self, tokens: Any) -> Any:
        """Tokens -> columns of ``logits``."""
        return self._row[tokens]

    def logits(self, hidden: Any) -> Any:
        """(k, d) -> (k, words in use + others)."""
        some = self.table[self._others[torch.randint(len(self._others), (_OTHERS,))]]
        return hidden @ torch.cat([self.rows, some]).T

    def put_back(self) -> None:
        """Write the trained rows into the table."""
        with torch.no_grad():
            self.table[self.used] = self.rows


class Readers(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """The linear readers: what a name's token and what a patch knows."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        d_head = d // config.num_attention_heads
        self.name, self.head = nn.Linear(d, 2 + 2 * GRID), nn.Linear(d_head, 2 + 2 * GRID)
        self.patch, self.inside = nn.Linear(d, 2 * GRID), nn.Linear(d, 2 * GRID)
        self.what, self.background = nn.Linear(d, len(EMOJI) + 1), nn.Linear(d, len(COLORS))


@dataclass
class Tally:
    """What a few steps came to: mean of each loss, share of right answers of each kind."""

    losses: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    def take(self, asked: Sequence[Sequence[Asked]], right: Any) -> None:
        """Count answers: right or not of each question, (b, q)."""
        for scene, line in zip(asked, right.tolist(), strict=True):
            for one, good in zip(scene, line, strict=True):
                self.right[one.question.kind].append(good)

    def line(self) -> str:
        """One line of both, and forget them."""
        said = [f"{name} {np.mean(some):.3f}" for name, some in self.losses.items()]
        said += [f"{kind} {100 * np.mean(some):.0f} %" for kind, some in sorted(self.right.items())]
        self.losses.clear()
        self.right.clear()
        return ", ".join(said)


@dataclass(frozen=True)
class Picture:
    """Image tokens of b scenes, and where they stand.

    Attributes:
        tokens: projected, (b, k, d).
        at: their numbers among all patches, (b, k).
        n: patches of a whole picture.
        cell: cell of each patch of a whole picture, (n,).
    """

    tokens: Any
    at: Any
    n: int
    cell: Any


@dataclass(frozen=True)
class Lessons:
    """One model's lessons: its parts, and what stands before and after a picture (tokens)."""

    language_model: Any
    config: Any
    words: Words
    readers: Readers
    tokenize: Tokenize
    before: Any
    after: Any
    weights: Mapping[str, float]

    @classmethod
    def of(cls, model: Any, checkpoint: Path, before: Sequence[str], after: Sequence[str], **weights: float) -> Lessons:
        """Lessons of transformers' model of a checkpoint.

        Args:
            model: of the checkpoint.
            checkpoint: folder; its tokenizer is used.
            before, after: texts on both sides of the image tokens, each tokenized by itself.
            weights: in place of ``WEIGHTS``.
        """
        tokenize, config = tokenizer_of(checkpoint), model.config.text_config
        words = Words(model.get_input_embeddings().weight, tokenize, [*before, *after])
        ends = [torch.tensor([t for text in end for t in tokenize(text)], dtype=torch.long) for end in (before, after)]
        return cls(
            model.model.language_model, config, words, Readers(config), tokenize, ends[0], ends[1], WEIGHTS | weights
        )

    def answers(self, picture: Picture, packed: Packed) -> tuple[Any, Any, demo_forward.Seen]:
        """(loss of each label, right or not of each question (b, q), what was seen inside)."""
        b = len(picture.tokens)
        q = packed.tokens.shape[1]
        n_before, n_after = len(self.before), len(self.after)
        ends = [self.words.embed(tokens).expand(b, -1, -1) for tokens in (self.before, self.after)]
        prefix = torch.cat([ends[0], picture.tokens, ends[1]], 1)
        behind = n_before + picture.n + torch.arange(n_after)
        at = torch.cat([torch.arange(n_before).expand(b, -1), n_before + picture.at, behind.expand(b, -1)], 1)
        tokens, position, real = (torch.from_numpy(x) for x in (packed.tokens, packed.position, packed.real))
        first = n_before + picture.n + n_after
        out, seen = demo_forward.run(
            self.language_model, self.config, prefix, at, self.words.embed(tokens), first + position, real, packed.m
        )
        labels = torch.from_numpy(packed.labels)[:, :, -packed.m :]
        wanted = labels != IGNORED
        logits, targets = self.words.logits(out[wanted]), self.words.targets(labels[wanted])
        owner = wanted.nonzero()
        wrong = torch.zeros(b * q, dtype=torch.long).index_add_(
            0, owner[:, 0] * q + owner[:, 1], (logits.argmax(-1) != targets).long()
        )
        return F.cross_entropy(logits, targets, reduction="none"), (wrong == 0).reshape(b, q), seen

    def right(self, picture: Picture, asked: Sequence[Sequence[Asked]]) -> Any:
        """Right or not of each question, bool (b, q)."""
        return self.answers(picture, pack(self.tokenize, asked))[1]

    def loss(self, picture: Picture, scenes: Sequence[Scene], asked: Sequence[Sequence[Asked]], tally: Tally) -> Any:
        """The sum of all lessons of a step."""
        packed = pack(self.tokenize, asked)
        each, right, seen = self.answers(picture, packed)
        parts = {"answers": each.sum() / right.numel()}  # by question, whatever its answer's length
        parts |= self._search(picture, asked, packed, seen)
        if picture.tokens.shape[1] == picture.n:
            start = len(self.before)
            inside = seen.into[:, start : start + picture.n]
            parts["places"] = self.places(self.readers.patch, picture.tokens, picture.cell, scenes)
            parts["inside"] = self.places(self.readers.inside, inside, picture.cell, scenes)
        for name, part in parts.items():
            tally.losses[name].append(part.item())
        tally.take(asked, right)
        return sum(self.weights.get(name, 1.0) * part for name, part in parts.items())

    def _search(
        self, picture: Picture, asked: Sequence[Sequence[Asked]], packed: Packed, seen: demo_forward.Seen
    ) -> dict[str, Any]:
        """Losses of the questions that look for an object; those whose object lost all its patches are left out."""
        n_before, k = len(self.before), picture.tokens.shape[1]
        p = n_before + k + len(self.after)
        rows, goals, cells = [], [], []
        for i, scene in enumerate(asked):
            kept = picture.cell[picture.at[i]]
            for j, one in enumerate(scene):
                if not one.to_name:
                    continue
                goal = torch.zeros(p, dtype=torch.bool)
                goal[n_before : n_before + k] = torch.isin(kept, torch.tensor(one.cells, dtype=torch.long))
                if one.cells and not goal.any():
                    continue
                if not one.cells:
                    goal[:n_before], goal[n_before + k :] = True, True
                rows.append((i, j, int(packed.name[i, j])))
                goals.append(goal)
                cells.append(one.cells)
        if not rows:
            return {}
        i, j, name = torch.tensor(rows).T
        there = torch.tensor([bool(one) for one in cells])
        n = packed.tokens.shape[2]
        goal = torch.cat([torch.stack(goals), ~there[:, None].expand(-1, n)], 1)
        looks = seen.logits[demo_forward.SEARCH_LAYER][i, j, name]
        search = looks.logsumexp(-1) - looks.masked_fill(~goal, -1e9).logsumexp(-1)
        looks = seen.logits[demo_forward.CARRY_LAYER][i, j]
        back = looks.logsumexp(-1) - looks.gather(-1, (p + name)[:, None, None].expand(-1, n, 1))[..., 0]
        says = torch.from_numpy(packed.labels)[i, j] != IGNORED
        found = torch.tensor(0.0)
        for reader, source in ((self.readers.head, seen.head), (self.readers.name, seen.after)):
            found = found + self._found(reader(F.rms_norm(source[i, j, name], source.shape[-1:])), cells)
        return {"search": search.mean(), "carry": back[says].mean(), "found": found}

    @staticmethod
    def _found(read: Any, cells: Sequence[tuple[int, ...]]) -> Any:
        """Loss of telling whether an object is there and, where there is one, its row and column."""
        loss = F.cross_entropy(read[:, :2], torch.tensor([int(bool(one)) for one in cells]))
        single = torch.tensor([len(one) == 1 for one in cells])
        if single.any():
            cell = torch.tensor([one[0] for one in cells if len(one) == 1])
            loss = loss + F.cross_entropy(read[single, 2 : 2 + GRID], cell // GRID)
            loss = loss + F.cross_entropy(read[single, 2 + GRID :], cell % GRID)
        return loss

    def places(self, reader: Any, tokens: Any, cell: Any, scenes: Sequence[Scene]) -> Any:
        """Loss of reading each patch's row and column from whole pictures' tokens, (b, n, d)."""
        read = reader(F.rms_norm(tokens, tokens.shape[-1:])).flatten(0, 1)
        full = [torch.tensor([placed.cell for placed in scene.objects]) for scene in scenes]
        weight = 1 + 3 * torch.stack([torch.isin(cell, one) for one in full]).flatten().float()
        cells = cell.repeat(len(tokens))
        row = F.cross_entropy(read[:, :GRID], cells // GRID, reduction="none")
        column = F.cross_entropy(read[:, GRID:], cells % GRID, reduction="none")
        return ((row + column) * weight).sum() / weight.sum()


def rate_at(done: float, step: int, peak: float, decay: float = 0.35) -> float:
    """Learning rate: 50 steps up, constant, and in the last `decay` of the time down to a fiftieth.

    Args:
        done: share of the time that is over, 0 to 1.
        step: number of the step in this run, from 0.
        peak: highest rate.
        decay: the part of the time in which it falls.

    Example:
        >>> rate_at(0.0, 0, 1.0) < rate_at(0.5, 900, 1.0) > rate_at(0.99, 2000, 1.0)
        True
    """
    return peak * min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - done) / decay))


def judge(answer: Callable[[int], Any], asked: Sequence[Sequence[Asked]], batch: int = 8) -> dict[str, float]:
    """Per cent of right answers by kind, "all" first; `answer`: first scene of a batch -> right or not, (b, q)."""
    tally = Tally()
    with torch.no_grad():
        for start in range(0, len(asked), batch):
            tally.take(asked[start : start + batch], answer(start))
    found = {"all": [good for some in tally.right.values() for good in some]} | dict(sorted(tally.right.items()))
    return {kind: 100 * float(np.mean(some)) for kind, some in found.items()}
