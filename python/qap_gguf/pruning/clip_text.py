"""CLIP's text tower of an mmproj file: how relevant each patch of an image is to a prompt.

CDPruner on LLaVA (arXiv 2506.10967): minus the cosine between CLIP's projected patch and CLIP's
embedding of the prompt. Prompts are tokenized in Python (clip_tokenizer.py, extra ``clip-text``).
The numbers are native (native/src/clip-text/clip-text.cpp); ``qap-gguf convert --clip-text`` writes the tower.
"""

from __future__ import annotations

import os
from types import TracebackType

from qap_gguf import _core
from qap_gguf.arguments import FloatArray, check_array, check_threads, n_threads_default, one_line
from qap_gguf.errors import ArrayError, ModelFileError, NativeError
from qap_gguf.files.gguf import read_gguf
from qap_gguf.pruning.clip_tokenizer import PREFIX, ClipTokenizer, load_tokenizer
from qap_gguf.runtime.devices import device_name

VERSION_KEY = "qap_clip_text.version"


class ClipTextTower:
    """An open text tower; a context manager. Calls from several threads run one after the other.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.pruning.clip_text import ClipTextTower
        >>> ClipTextTower.open(qap.packaged_model().mmproj) is None  # the packaged file carries none
        True
    """

    def __init__(self, native: _core.ClipText, tokenizer: ClipTokenizer) -> None:
        """Use :meth:`open`."""
        self._native: _core.ClipText | None = native
        self._tokenizer = tokenizer

    @classmethod
    def open(
        cls, mmproj: str | os.PathLike[str], *, device: str | None = None, n_threads: int | None = None
    ) -> ClipTextTower | None:
        """Load the tower of an mmproj file; None when the file carries none.

        Args:
            mmproj: the GGUF file.
            device: a ggml device by name or alias, in any case (``qap-gguf info`` lists them); None is the CPU.
            n_threads: CPU threads; None is ``QAP_THREADS``, or one for each physical core that the process may use.

        Raises:
            ModelFileError: no such file, not GGUF, damaged, or with a tower that contradicts itself.
            ConfigError: `device` or `n_threads` is not as described.
        """
        check_threads(n_threads)
        name = device_name(device)
        metadata = read_gguf(mmproj).metadata
        if VERSION_KEY not in metadata:
            return None
        try:
            native = _core.ClipText(os.fspath(mmproj), name, n_threads or n_threads_default())
            arrays = _core.gguf_arrays(os.fspath(mmproj), PREFIX)
        except ValueError as err:
            raise ModelFileError(one_line(err)) from err
        try:
            tokenizer = load_tokenizer(metadata, arrays, n_ctx=native.n_ctx, n_vocab=native.n_vocab)
        except ModelFileError as err:
            raise ModelFileError(f"{os.fspath(mmproj)}: {one_line(err)}") from err
        return cls(native, tokenizer)

    @property
    def n_ctx(self) -> int:
        """The longest prompt in tokens, its begin and end included; what is longer is cut."""
        return self._open().n_ctx

    @property
    def n_proj(self) -> int:
        """Length of the embeddings that patches and prompts share."""
        return self._open().n_proj

    @property
    def n_hidden(self) -> int:
        """Width of the vision tower."""
        return self._open().n_hidden

    def tokenize(self, prompt: str) -> list[int]:
        """CLIP's token ids of a prompt: begin, at most ``n_ctx - 2`` of the text, end.

        Raises:
            ConfigError: `prompt` is no text, or longer than 1 MiB, or the extra ``clip-text`` is not installed.
        """
        self._open()
        return self._tokenizer.ids(prompt)

    def embed(self, prompt: str) -> FloatArray:
        """CLIP's embedding of a prompt, float32 (n_proj,), not normalised.

        Raises:
            ConfigError: `prompt` is no text, or longer than 1 MiB.
            NativeError: the file's weights give numbers that are not finite.
        """
        ids = self.tokenize(prompt)
        try:
            return self._open().embed(ids)
        except ValueError as err:
            raise NativeError(one_line(err)) from err

    def project(self, hidden: FloatArray) -> FloatArray:
        """CLIP's embedding of each patch, float32 (n_tok, n_proj), not normalised.

        Args:
            hidden: the input of LLaVA's projector, float32 (n_tok, n_hidden), C order, finite, |x| <= 1e30.

        Raises:
            ArrayError: wrong dtype, shape, order, or values out of range.
        """
        self._check_hidden(hidden)
        try:
            return self._open().project(hidden)
        except ValueError as err:
            raise ArrayError(one_line(err)) from err

    def relevance(self, hidden: FloatArray, prompt: str) -> FloatArray:
        """Relevance of each patch to the prompt, float32 (n_tok,) in [-1, 1]: minus their cosine; 0 for a zero.

        Args:
            hidden: the input of LLaVA's projector, float32 (n_tok, n_hidden), C order, finite, |x| <= 1e30.
            prompt: the question.

        Raises:
            ArrayError: wrong dtype, shape, order, or values out of range.
            ConfigError: `prompt` is no text, or longer than 1 MiB.
        """
        ids = self.tokenize(prompt)
        self._check_hidden(hidden)
        try:
            return self._open().relevance(hidden, ids)
        except ValueError as err:
            raise ArrayError(one_line(err)) from err

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""
        self._native = None

    def __enter__(self) -> ClipTextTower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> _core.ClipText:
        if self._native is None:
            raise NativeError("expected an open text tower, got a closed one; open it again")
        return self._native

    def _check_hidden(self, hidden: object) -> None:
        array, width = check_array("hidden", hidden, 2), self.n_hidden
        if array.shape[1] != width:
            raise ArrayError(
                f"hidden: expected (n_tok, {width}), got {array.shape}; pass the projector's input of this mmproj"
            )
