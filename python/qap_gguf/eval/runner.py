"""Ask every question in every way that is compared, encoding each picture once, or once for each early drop.

Greedy decoding and a short answer, so that the outcome depends on nothing but the model, the picture and the config.
Picture by picture, variant by variant, question by question: in this order the KV cache serves longest.
The model is passed in (a VisionModel or anything with its `encode`, `prune` and `generate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError, NativeError, UnsupportedError
from qap_gguf.eval.data import Question
from qap_gguf.eval.made_tokens import replaced_image, replacement
from qap_gguf.eval.methods import REPLACED, RESIZE, Variant
from qap_gguf.eval.smaller import SmallerPictures
from qap_gguf.vision.cache import early_identity

MAX_TOKENS: Final = 12  #: "row 2, column 3" has seven tokens

Report = Callable[[int, int], None]


class Model(Protocol):
    """What an evaluation needs of qap_gguf.VisionModel."""

    @property
    def encode(self) -> Callable[..., Any]:
        """encode(image) -> ImageEmbedding; encode(image, config) where the config asks for an early drop."""

    @property
    def prune(self) -> Callable[..., Any]:
        """prune(image, config, question) -> PrunedImage."""

    @property
    def generate(self) -> Callable[..., Any]:
        """generate([image, text], prune=..., max_tokens=..., temperature=..., stream=True) -> Generation."""


@dataclass(frozen=True)
class Setup:
    """A language model's file and the type of its KV cache, as the tables name them.

    Attributes:
        model: name of the file; "" where there is one.
        kv: type of the cache; "" where nothing was asked for.
    """

    model: str = ""
    kv: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of one question under one variant.

    Attributes:
        question: the question.
        variant: how tokens were kept.
        said: the model's answer in each repetition.
        n_kept: image tokens that the language model read.
        prefill_s: seconds of each prefill of the whole prompt; () where the KV cache held the image already.
        setup: which language model answered.
    """

    question: Question
    variant: Variant
    said: tuple[str, ...]
    n_kept: int
    prefill_s: tuple[float, ...]
    setup: Setup = Setup()

    @property
    def share_right(self) -> float:
        """What the answers are worth, mean over the repetitions, in [0, 1]."""
        return sum(map(self.question.score, self.said)) / len(self.said)


class Recorder(Protocol):
    """Where outcomes are remembered from an earlier run and written to; see qap_gguf.eval.journal."""

    def get(self, setup: Setup, variant: Variant, number: int, question: Question) -> Outcome | None:
        """The outcome of question `number`, if it is known."""

    def add(self, outcome: Outcome, number: int) -> None:
        """Remember an outcome."""


@dataclass(frozen=True)
class _Answer:
    """The text, the image tokens that were read, and the seconds of the prefill, None where it was partial."""

    said: str
    n_kept: int
    prefill_s: float | None


class _Picture:
    """Answers to the questions about one picture.

    The same tokens and the same question give the same answer, so what was asked is not asked again: two settings often
    keep the same tokens. For the same reason the image stays in the KV cache from one question to the next.
    """

    def __init__(self, model: Model, image: Any, max_tokens: int, smaller: Callable[[int], Any]) -> None:
        self._model, self._image, self._max_tokens, self._smaller = model, image, max_tokens, smaller
        self._shown: dict[str, tuple[Any, PruneConfig | None]] = {}
        self._known: dict[tuple[Question, str | bytes], _Answer] = {}
        self._read: set[str | bytes] = set()

    def answer(self, question: Question, variant: Variant, config: PruneConfig | None) -> _Answer:
        """The answer under one config of a variant."""
        image, used = self._shown_for(variant, config)
        key: str | bytes = "dense"
        if image is not self._image:
            key = variant.key
        elif used is not None:
            key = self._kept(question, used).tobytes()
        known = self._known.get((question, key))
        if known is not None:
            return known
        expected = image.n_tokens if used is None else self._count(used)
        said, stats = _generate(self._model, image, question, used, self._max_tokens)
        if stats.n_image_kept != expected:  # a table whose rows kept something else than they say is worse than none
            raise NativeError(
                f"{variant.method} was to keep {expected} image tokens, got {stats.n_image_kept}; "
                "report this together with the output of `qap-gguf info`"
            )
        whole = key not in self._read  # else the KV cache may have held the image
        self._read.add(key)
        self._known[question, key] = _Answer(said, expected, float(stats.prefill_s) if whole else None)
        return self._known[question, key]

    def _count(self, config: PruneConfig) -> int:
        return min(config.count(self._image.n_real), int(self._image.n_left))

    def _kept(self, question: Question, config: PruneConfig) -> Any:
        return self._model.prune(self._image, config, question.text).indices

    def _shown_for(self, variant: Variant, config: PruneConfig | None) -> tuple[Any, PruneConfig | None]:
        """(image, config) such that keeping what the config says makes the language model read the variant's tokens."""
        if variant.method not in (*REPLACED, RESIZE) or config is None:
            return self._image, config
        if variant.method == RESIZE and variant.key not in self._shown:
            self._shown[variant.key] = self._smaller(self._count(config)), None
        if variant.key not in self._shown:
            tokens = replacement(variant.method, self._image, self._count(config))
            kept = config.replace(n_keep=len(tokens))
            indices = self._model.prune(self._image, kept).indices
            self._shown[variant.key] = replaced_image(self._image, tokens, indices), kept
        return self._shown[variant.key]


def _generate(model: Any, image: Any, question: Question, config: PruneConfig | None, max_tokens: int) -> Any:
    """(answer, stats): the text, or the likeliest choice."""
    generation = model.generate(
        [image, question.text], prune=config, max_tokens=max_tokens, temperature=0.0, stream=True
    )
    if not question.choices:
        return "".join(generation), generation.stats
    from qap_gguf.language.likelihood import likelihoods

    found = likelihoods(model.language_model, question.choices)
    generation.close()
    return question.choices[found.index(max(found))], generation.stats


def evaluate(
    model: Model,
    questions: Sequence[Question],
    variants: Sequence[Variant],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Report | None = None,
    setup: Setup | None = None,
    embeddings: MutableMapping[Any, Any] | None = None,
    journal: Recorder | None = None,
) -> list[Outcome]:
    """Ask every question under every variant.

    Args:
        model: a VisionModel, or what behaves like one.
        questions: see :func:`qap_gguf.eval.load_questions`. Each picture is encoded once for each early drop.
        variants: see :func:`qap_gguf.eval.variants`.
        max_tokens: longest answer in tokens, at least 1.
        progress: called as progress(done, total) after each question.
        setup: what the outcomes are labelled with.
        embeddings: pictures that another language model with the same encoder has encoded, by path; grows.
        journal: what is recorded there is not asked again, what is asked is recorded.

    Returns:
        One outcome for each question and variant, picture by picture.

    Raises:
        ConfigError: nothing to ask.
        UnsupportedError: a variant needs class-token attention and the model has none.
        ImageError and others: whatever the model raises.
    """
    if not questions or not variants:
        raise ConfigError("an evaluation needs questions and variants, got none; pass at least one of each")
    setup = Setup() if setup is None else setup
    by_image: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        by_image.setdefault(question.image, []).append(number)
    outcomes: list[Outcome] = []
    done = 0
    with SmallerPictures(model) as smaller:
        for path, numbers in by_image.items():
            pictures: dict[str, _Picture] = {}
            for variant in variants:
                found = {n: None if journal is None else journal.get(setup, variant, n, questions[n]) for n in numbers}
                new = {n: questions[n] for n, outcome in found.items() if outcome is None}
                if new:
                    early = _early(variant)
                    picture = pictures.get(early)
                    if picture is None:
                        image = _encoded(model, path, variant.configs[0], variants, embeddings)
                        picture = pictures[early] = _Picture(model, image, max_tokens, partial(smaller.encode, path))
                    for n, outcome in _asked(picture, new, variant, setup).items():
                        if journal is not None:
                            journal.add(outcome, n)
                        found[n] = outcome
                outcomes += [outcome for outcome in found.values() if outcome is not None]
            for _ in numbers:
                done += 1
                if progress is not None:
                    progress(done, len(questions))
    return outcomes


def _asked(picture: _Picture, questions: Mapping[int, Question], variant: Variant, setup: Setup) -> dict[int, Outcome]:
    """Questions about one picture under one variant: all of them in a row for each of its configs."""
    answers = [[picture.answer(question, variant, config) for question in questions.values()]
               for config in variant.configs]  # fmt: skip
    found = {}
    for (number, question), mine in zip(questions.items(), zip(*answers, strict=True), strict=True):
        said = tuple(answer.said for answer in mine)
        prefill = tuple(answer.prefill_s for answer in mine if answer.prefill_s is not None)
        found[number] = Outcome(question, variant, said, mine[-1].n_kept, prefill, setup)
    return found


def _early(variant: Variant) -> str:
    """What tells pictures apart of which the encoder left different tokens out: "" where it left none out."""
    config = variant.configs[0]
    return "" if config is None or not config.drops_early else early_identity("", config)


def _encoded(
    model: Model,
    path: Any,
    config: PruneConfig | None,
    variants: Sequence[Variant],
    embeddings: MutableMapping[Any, Any] | None,
) -> Any:
    early = config is not None and config.drops_early
    key = (path, early_identity("", config)) if early else path
    image = None if embeddings is None else embeddings.get(key)
    if image is None:
        image = model.encode(path, config) if early else model.encode(path)
        if embeddings is not None:
            embeddings[key] = image
    if image.attention is None and any(variant.needs_attention for variant in variants):
        raise UnsupportedError(
            "semantic selection needs class-token attention, which this model has not; leave that method out"
        )
    return image
