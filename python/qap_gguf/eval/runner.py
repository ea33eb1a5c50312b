"""Ask every question in every way that is compared, encoding each picture once.

Greedy decoding and a short answer, so that the outcome depends on nothing but the model, the picture and the config.
The model is passed in (a VisionModel or anything with its `encode` and `generate`): no native code is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from qap_gguf.errors import ConfigError, NativeError, UnsupportedError
from qap_gguf.eval.data import Question, is_right
from qap_gguf.eval.methods import Variant

MAX_TOKENS: Final = 12  #: "row 2, column 3" has seven tokens

Report = Callable[[int, int], None]


class Model(Protocol):
    """What an evaluation needs of qap_gguf.VisionModel."""

    @property
    def encode(self) -> Callable[[Any], Any]:
        """encode(image) -> ImageEmbedding."""

    @property
    def generate(self) -> Callable[..., Any]:
        """generate([image, text], prune=..., max_tokens=..., temperature=..., stream=True) -> Generation."""


@dataclass(frozen=True)
class Outcome:
    """What became of one question under one variant.

    Attributes:
        question: the question.
        variant: how tokens were kept.
        said: the model's answer in each repetition.
        n_kept: image tokens that the language model read.
        prefill_s: seconds of prefill in each repetition.
    """

    question: Question
    variant: Variant
    said: tuple[str, ...]
    n_kept: int
    prefill_s: tuple[float, ...]

    @property
    def share_right(self) -> float:
        """Part of the repetitions whose answer was right, in [0, 1]."""
        return sum(is_right(said, self.question.answer) for said in self.said) / len(self.said)


def _ask(model: Model, image: Any, question: Question, variant: Variant, max_tokens: int) -> Outcome:
    said, prefill, kept = [], [], 0
    for config in variant.configs:
        expected = image.n_tokens if config is None else config.count(image.n_tokens)
        generation = model.generate(
            [image, question.text], prune=config, max_tokens=max_tokens, temperature=0.0, stream=True
        )
        said.append("".join(generation))
        kept = generation.stats.n_image_kept
        if kept != expected:  # a table whose rows kept something else than they say is worse than none
            raise NativeError(
                f"{variant.method} was to keep {expected} image tokens, got {kept}; "
                "report this together with the output of `qap-gguf info`"
            )
        prefill.append(float(generation.stats.prefill_s))
    return Outcome(question, variant, tuple(said), kept, tuple(prefill))


def evaluate(
    model: Model,
    questions: Sequence[Question],
    variants: Sequence[Variant],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Report | None = None,
) -> list[Outcome]:
    """Ask every question under every variant.

    Args:
        model: a VisionModel, or what behaves like one.
        questions: see :func:`qap_gguf.eval.load_questions`. Each picture is encoded once.
        variants: see :func:`qap_gguf.eval.variants`.
        max_tokens: longest answer in tokens, at least 1.
        progress: called as progress(done, total) after each question.

    Returns:
        One outcome for each question and variant, picture by picture.

    Raises:
        ConfigError: nothing to ask, or a budget above the image's tokens.
        UnsupportedError: a variant needs class-token attention and the model has none.
        ImageError and others: whatever the model raises.
    """
    if not questions or not variants:
        raise ConfigError("an evaluation needs questions and variants, got none; pass at least one of each")
    by_image: dict[Any, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    outcomes: list[Outcome] = []
    done = 0
    for path, asked in by_image.items():
        image = model.encode(path)
        if image.attention is None and any(variant.needs_attention for variant in variants):
            raise UnsupportedError(
                "semantic selection needs class-token attention, which this model has not; leave that method out"
            )
        for question in asked:
            outcomes += [_ask(model, image, question, variant, max_tokens) for variant in variants]
            done += 1
            if progress is not None:
                progress(done, len(questions))
    return outcomes
