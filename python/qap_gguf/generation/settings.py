"""An answer in the making: :class:`Generation` yields its text, :class:`GenerationStats` says what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from qap_gguf.arguments import IndexArray, check_sampling
from qap_gguf.config import PruneConfig
from qap_gguf.defaults import UNSET, Unset, check_config
from qap_gguf.language.turn_lock import Stream


class ChatSettings(TypedDict, total=False):
    """Keyword arguments of ``VisionModel.generate`` and ``chat``.

    Attributes:
        prune: how to prune every image; None keeps all tokens. Left out, it is ``VisionModel.default_prune``, or that
            of :func:`qap_gguf.use`.
        max_tokens: longest answer, in tokens (128).
        temperature: 0 (default) takes the likeliest token; with more, the next three apply.
        top_k: likeliest tokens to choose from, 0 is all (40).
        top_p: smallest set of tokens with this probability, 0..1 (0.95).
        min_p: least probability relative to the likeliest token, 0..1 (0.05).
        stop: texts that end the answer; they are not part of it.
    """

    prune: PruneConfig | None
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: str | Sequence[str]


@dataclass(frozen=True)
class AnswerSettings:
    """:class:`ChatSettings` with its defaults, checked.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
        TypeError: an unknown name, as for any function.
    """

    prune: PruneConfig | Unset | None = UNSET
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        check_sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.min_p)
        if not (self.prune is None or isinstance(self.prune, Unset)):
            check_config(self.prune)


@dataclass
class GenerationStats:
    """Counts and times of one answer. The times are wall-clock seconds; they are complete when the text is.

    Attributes:
        n_image_tokens: tokens of all images before pruning.
        n_image_kept: tokens of all images that the language model saw.
        n_prompt_tokens: text tokens of the prompt.
        n_reused: cells of the prompt that were in the KV cache already.
        n_generated: tokens of the answer.
        n_cached: images that an earlier answer, or another process, has encoded.
        n_kv: cells of the KV cache in use after the answer.
        encode_s: image encoder and projector, of the images that were encoded for this answer.
        encode_bytes: what those encodes copied from the device to the host.
        score_s: scores of all images.
        select_s: selection and gathering of the kept rows.
        prefill_s: the language model's pass over the prompt.
        decode_s: the language model's passes for the answer, with sampling; the last token has no pass.
        finish_reason: "stop" where the model or a stop text ended the answer, "length" where `max_tokens` or the
            context did; None before the end.
    """

    n_image_tokens: int = 0
    n_image_kept: int = 0
    n_prompt_tokens: int = 0
    n_reused: int = 0
    n_generated: int = 0
    n_cached: int = 0
    n_kv: int = 0
    encode_s: float = 0.0
    encode_bytes: int = 0
    score_s: float = 0.0
    select_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON."""
        return asdict(self)


class Generation(Iterator[str]):
    """Iterator over the pieces of an answer.

    Attributes:
        stats: grows while the text is read; complete after the last piece.
        kept: numbers of the tokens of each image that the language model read, int32 (k,), ascending.

    Example:
        >>> import qap_gguf as qap
        >>> vlm = qap.VisionModel()
        >>> gen = vlm.generate([qap.packaged_model().sample, "How many objects are there?"], prune=None, stream=True)
        >>> "".join(gen), gen.stats.n_image_tokens, len(gen.kept[0])
        ('four', 144, 144)
    """

    def __init__(self, pieces: Stream[str], stats: GenerationStats, kept: Sequence[IndexArray]) -> None:
        self._pieces = pieces
        self.stats = stats
        self.kept = tuple(kept)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here; the model can be used again at once."""
        self._pieces.close()
