"""Ask every question in every way that is compared, encoding each picture once.

Greedy decoding and a short answer, so that the outcome depends on nothing but the model, the picture and the config.
The model is passed in (a VisionModel or anything with its `encode`, `prune` and `generate`).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError, NativeError, UnsupportedError
from qap_gguf.eval.data import Question
from qap_gguf.eval.methods import REPLACED, Variant
from qap_gguf.eval.replaced import replaced_image, replacement

MAX_TOKENS: Final = 12  #: "row 2, column 3" has seven tokens

Report = Callable[[int, int], None]


class Model(Protocol):
    """What an evaluation needs of qap_gguf.VisionModel."""

    @property
    def encode(self) -> Callable[[Any], Any]:
        """encode(image) -> ImageEmbedding."""

    @property
    def prune(self) -> Callable[..., Any]:
        """prune(image, config) -> PrunedImage."""

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
        prefill_s: seconds of prefill in each repetition.
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


def _answer(model: Any, image: Any, question: Question, config: PruneConfig | None, max_tokens: int) -> Any:
    """(answer, stats): the text, or the likeliest choice."""
    generation = model.generate(
        [image, question.text], prune=config, max_tokens=max_tokens, temperature=0.0, stream=True
    )
    if not question.choices:
        return "".join(generation), generation.stats
    from qap_gguf.likelihood import likelihoods

    found = likelihoods(model.language_model, question.choices)
    generation.close()
    return question.choices[found.index(max(found))], generation.stats


def _replaced(model: Model, image: Any, variant: Variant, config: PruneConfig) -> tuple[Any, PruneConfig]:
    """(image, config) such that keeping what the config says makes the language model read the variant's tokens."""
    tokens = replacement(variant.method, image, config.count(image.n_tokens))
    kept = config.replace(n_keep=len(tokens))
    return replaced_image(image, tokens, model.prune(image, kept).indices), kept


def _ask(
    model: Model, image: Any, question: Question, variant: Variant, max_tokens: int, setup: Setup, seen: dict[str, Any]
) -> Outcome:
    said, prefill, kept = [], [], 0
    for config in variant.configs:
        shown, used = image, config
        if variant.method in REPLACED and config is not None:
            if variant.key not in seen:
                seen[variant.key] = _replaced(model, image, variant, config)
            shown, used = seen[variant.key]
        expected = image.n_tokens if used is None else used.count(image.n_tokens)
        text, stats = _answer(model, shown, question, used, max_tokens)
        said.append(text)
        kept = stats.n_image_kept
        if kept != expected:  # a table whose rows kept something else than they say is worse than none
            raise NativeError(
                f"{variant.method} was to keep {expected} image tokens, got {kept}; "
                "report this together with the output of `qap-gguf info`"
            )
        prefill.append(float(stats.prefill_s))
    return Outcome(question, variant, tuple(said), kept, tuple(prefill), setup)


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
        questions: see :func:`qap_gguf.eval.load_questions`. Each picture is encoded once.
        variants: see :func:`qap_gguf.eval.variants`.
        max_tokens: longest answer in tokens, at least 1.
        progress: called as progress(done, total) after each question.
        setup: what the outcomes are labelled with.
        embeddings: pictures that another language model with the same encoder has encoded, by path; grows.
        journal: what is recorded there is not asked again, what is asked is recorded.

    Returns:
        One outcome for each question and variant, picture by picture.

    Raises:
        ConfigError: nothing to ask, or a budget above the image's tokens.
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
    for path, numbers in by_image.items():
        image, seen = None, {}  # type: tuple[Any, dict[str, Any]]
        for number in numbers:
            question = questions[number]
            for variant in variants:
                known = None if journal is None else journal.get(setup, variant, number, question)
                if known is None:
                    image = _encoded(model, path, variants, embeddings) if image is None else image
                    known = _ask(model, image, question, variant, max_tokens, setup, seen)
                    if journal is not None:
                        journal.add(known, number)
                outcomes.append(known)
            done += 1
            if progress is not None:
                progress(done, len(questions))
    return outcomes


def _encoded(model: Model, path: Any, variants: Sequence[Variant], embeddings: MutableMapping[Any, Any] | None) -> Any:
    image = None if embeddings is None else embeddings.get(path)
    if image is None:
        image = model.encode(path)
        if embeddings is not None:
            embeddings[path] = image
    if image.attention is None and any(variant.needs_attention for variant in variants):
        raise UnsupportedError(
            "semantic selection needs class-token attention, which this model has not; leave that method out"
        )
    return image
