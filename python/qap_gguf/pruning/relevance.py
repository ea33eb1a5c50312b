"""Semantic relevance of an image's tokens: which signals there are, and the numbers of the one that was asked for.

docs/method.md, section 4. `cls` and `attention` come with the encode; `text` compares each token with the mean input
embedding of the prompt's own text tokens; `clip_text` needs CLIP's text tower in the mmproj file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qap_gguf import _core
from qap_gguf.config import PruneConfig
from qap_gguf.defaults import to_params
from qap_gguf.errors import UnsupportedError

FloatArray = npt.NDArray[np.float32]

#: What `auto` takes, the first that the model and the prompt allow.
AUTO_ORDER = tuple(_core.signal_order())
#: Signals that look at the prompt.
OF_PROMPT = ("text", "clip_text")


class TextTower(Protocol):
    """CLIP's text tower, as :class:`qap_gguf.pruning.clip_text.ClipTextTower` is one."""

    def relevance(self, hidden: FloatArray, prompt: str) -> FloatArray:
        """Minus the cosine of each projected patch and the projected prompt, (n_tok,)."""
        ...


class TokenEmbedder(Protocol):
    """Input embeddings of a language model."""

    def mean(self, text: str) -> FloatArray | None:
        """Mean input embedding of a text's tokens, (n_embd,); None for a text without tokens."""
        ...


@dataclass(frozen=True, eq=False)
class Signals:
    """What relevance can be made of, for one image and one prompt; None is what is missing.

    Attributes:
        attention: class-token attention, (n_tok,).
        received: attention received, (n_tok,).
        hidden: the projector's input, (n_tok, n_hidden).
        features: what the language model gets, (n_tok, n_embd).
        prompt: the question's text.
        tower: CLIP's text tower.
        embedder: input embeddings of the language model.
    """

    features: FloatArray
    attention: FloatArray | None = None
    received: FloatArray | None = None
    hidden: FloatArray | None = None
    prompt: str | None = None
    tower: TextTower | None = None
    embedder: TokenEmbedder | None = None

    def available(self) -> tuple[str, ...]:
        """Names of the signals that can be given, in the order of ``auto``."""
        asked = bool(self.prompt and self.prompt.strip())
        have = {
            "clip_text": asked and self.tower is not None and self.hidden is not None,
            "cls": self.attention is not None,
            "text": asked and self.embedder is not None,
            "attention": self.received is not None,
        }
        return tuple(name for name in AUTO_ORDER if have[name])

    def pick(self, cfg: PruneConfig) -> str:
        """The signal that `cfg` takes of those that there are; "none" where ``auto`` finds none.

        Raises:
            UnsupportedError: the signal cannot be given (the message lists those that can), or without one nothing is
                left to rank by.
        """
        try:
            return _core.signal(to_params(cfg), list(self.available()))
        except ValueError as err:
            asked = cfg.semantic in OF_PROMPT and not self.prompt
            hint = f"cannot give {cfg.semantic} (it looks at the prompt: pass one)"
            raise UnsupportedError(
                str(err).replace(f"cannot give {cfg.semantic}", hint) if asked else str(err)
            ) from err

    def of_prompt(self, signal: str) -> FloatArray | None:
        """Relevance to the prompt, float32 (n_tok,), for one of ``OF_PROMPT`` that is available; else None."""
        if signal not in OF_PROMPT:
            return None
        assert self.prompt is not None  # available() saw to it
        if signal == "clip_text":
            assert self.tower is not None
            assert self.hidden is not None
            return self.tower.relevance(self.hidden, self.prompt)
        assert self.embedder is not None
        mean = self.embedder.mean(self.prompt)
        if mean is None:
            raise UnsupportedError("semantic: text needs a prompt with at least one token; use cls, attention or none")
        return cosine_to(self.features, mean)

    def relevance(self, semantic: str) -> FloatArray | None:
        """Relevance before normalisation, float32 (n_tok,); None for "none", or for "auto" where there is no signal.

        Raises:
            UnsupportedError: the signal cannot be given; the message lists those that can.
        """
        signal = self.pick(PruneConfig(semantic=semantic))
        noted = {"cls": self.attention, "attention": self.received}
        return noted[signal] if signal in noted else self.of_prompt(signal)


def cosine_to(x: FloatArray, vector: FloatArray) -> FloatArray:
    """Cosine of each row of `x` (n_tok, n_embd) to `vector` (n_embd,), float32 (n_tok,); 0 for zeros.

    Example:
        >>> import numpy as np
        >>> cosine_to(np.array([[3.0, 4.0], [0.0, 0.0]], "f4"), np.array([0.0, 2.0], "f4"))
        array([0.8, 0. ], dtype=float32)
    """
    rows, to = x.astype(np.float64), vector.astype(np.float64)
    norms = np.sqrt((rows * rows).sum(axis=1)) * np.sqrt((to * to).sum())
    dots = rows @ to
    cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return np.asarray(cosines, dtype=np.float32)
