"""The vocabulary and the metadata of a language model, without the model: what a guard in front of it needs.

``llama_cpp.Llama(vocab_only=True)`` makes a context too, and says on stderr that it is too large for the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp
from llama_cpp import _internals

from qap_gguf.errors import ModelFileError
from qap_gguf.language.interrupts import held_back


class Vocabulary:
    """The part of ``llama_cpp.Llama`` that knows of tokens.

    Args:
        path: the GGUF file, which has passed :func:`~qap_gguf.files.gguf.check_pair`.

    Attributes:
        metadata: the file's keys, as texts.

    Raises:
        ModelFileError: llama.cpp refuses the file.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.language.vocabulary import Vocabulary
        >>> words = Vocabulary(qap.packaged_model().model)
        >>> words.detokenize(words.tokenize(b"row 1", add_bos=False))
        b'row 1'
        >>> words.close()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        try:
            with held_back():
                self._model: Any = _internals.LlamaModel(path_model=os.fspath(path), params=params, verbose=False)
                self.metadata: Mapping[str, str] = self._model.metadata()
        except Exception as err:
            raise ModelFileError(
                f"expected a language model that llama.cpp can load, got {path} ({' '.join(str(err).split())}); "
                "download it again"
            ) from err

    @property
    def address(self) -> int:
        """Address of the native ``llama_model``."""
        return int(self._model.model)

    def n_vocab(self) -> int:
        """How many tokens there are."""
        return int(self._model.n_vocab())

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text in UTF-8; `special`: special tokens are found in it."""
        return [int(token) for token in self._model.tokenize(text, add_bos, special)]

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """The text of token ids, in UTF-8."""
        return bytes(self._model.detokenize(list(tokens)))

    def close(self) -> None:
        """Let go of it."""
        self._model.close()
