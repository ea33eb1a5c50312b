"""A vision-language model: an mmproj file and a language model, with pruning between them.

The encoder runs once for an image and gives all its tokens; scores, selection and prefill run for each question.
Design: docs/design.md. Embeddings reach the language model through upstream's own
``mtmd_helper_decode_image_chunk``, so that positions and attention masks are upstream's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import llama_cpp

from qap_gguf.arguments import FloatArray, check_integer, check_threads, n_threads_default
from qap_gguf.config import PruneConfig
from qap_gguf.defaults import check_config
from qap_gguf.errors import ConfigError, ImageError, QapError, UnsupportedError
from qap_gguf.files.gguf import check_pair
from qap_gguf.files.packaged import packaged_model
from qap_gguf.generation.answers import Answers
from qap_gguf.generation.prompts import flatten, question_of, render
from qap_gguf.generation.settings import AnswerSettings, ChatSettings, Generation, GenerationStats
from qap_gguf.language.llama import LanguageModel, TextStream, open_llama
from qap_gguf.pruning.clip_text import ClipTextTower
from qap_gguf.pruning.prune import PrunedImage, prune_image, score_image
from qap_gguf.pruning.relevance import Signals
from qap_gguf.pruning.score import Scores
from qap_gguf.runtime.devices import device_name, language_settings
from qap_gguf.vision.cache import EmbeddingCache, early_identity, image_key
from qap_gguf.vision.embedding import ImageEmbedding, check_embedding, check_rows
from qap_gguf.vision.encoder import ImageEncoder
from qap_gguf.vision.images import ImageSource, load_image
from qap_gguf.vision.resize import check_resize

if TYPE_CHECKING:
    from typing_extensions import Unpack

Message = Mapping[str, Any]
Part = Any  # an ImageEmbedding, an ImageSource, or a str that is text


class VisionModel:
    """An image encoder and a language model that answer questions about pictures.

    Args:
        mmproj: the mmproj file; None with `model` None takes the packaged model.
        model: the language model: a GGUF file, or a loaded ``llama_cpp.Llama`` (which stays the caller's to close).
        device: where the image encoder and the language model run: a ggml device by name or alias, in any case
            ("cpu", "cuda0", "metal", ...; ``qap-gguf info`` lists them); None takes the GPUs there are.
        model_device: another device for the language model; "all" spreads it over all GPUs; None is `device`.
        n_ctx: cells of the KV cache, for a model that is loaded here.
        n_threads: CPU threads; None is all that the process may use.
        n_batch: tokens of a prefill batch.
        seed: of sampling.
        flash_attn: flash attention in the encoder; None is upstream's choice (on where the device has it).
        resize: how pictures come to the encoder's size, "auto" (as the model was trained), "stretch" or "pad"; None is
            that of :func:`~qap_gguf.set_resize`.
        cache: where encoded images are kept, so that each is encoded once; None is a cache of its own, in memory.
        verbose: let upstream write its log to stderr.

    Raises:
        ModelFileError: a file is missing, damaged, of the wrong kind, or the two do not belong together.
        ConfigError: an argument is outside its range.

    Example:
        >>> import qap_gguf as qap
        >>> with qap.VisionModel() as vlm:
        ...     image = vlm.encode(qap.packaged_model().sample)
        ...     kept = vlm.prune(image, qap.PruneConfig(n_keep=18)).indices
        >>> image.grid, len(kept)
        ((12, 12), 18)
    """

    def __init__(
        self,
        mmproj: str | os.PathLike[str] | None = None,
        model: str | os.PathLike[str] | llama_cpp.Llama | None = None,
        *,
        device: str | None = None,
        model_device: str | None = None,
        n_ctx: int = 2048,
        n_threads: int | None = None,
        n_batch: int = 512,
        seed: int = 0,
        flash_attn: bool | None = None,
        resize: str | None = None,
        cache: EmbeddingCache | None = None,
        verbose: bool = False,
    ) -> None:
        if (mmproj is None) != (model is None):
            raise ConfigError("mmproj and model: expected both or none (the packaged model), got one; pass the other")
        for name, value, low in (("n_ctx", n_ctx, 1), ("n_batch", n_batch, 1), ("seed", seed, 0)):
            check_integer(name, value, low)
        check_threads(n_threads)
        if flash_attn is not None and not isinstance(flash_attn, bool):
            raise ConfigError(f"flash_attn: expected True, False or None, got {flash_attn!r}; choose one of these")
        resize = None if resize is None else check_resize(resize)
        if mmproj is None or model is None:
            packaged = packaged_model()
            mmproj, model = packaged.mmproj, packaged.model

        self._threads = n_threads or n_threads_default()
        self._closed = False
        encoder_device = device_name(device)
        settings = language_settings(device if model_device is None else model_device)
        self._owned: llama_cpp.Llama | None = None
        if isinstance(model, llama_cpp.Llama):
            if model_device is not None:
                raise ConfigError(
                    f"model_device: expected None for a Llama that is loaded already, got {model_device!r}; "
                    "pass the model's path, or load the Llama where it belongs"
                )
            check_pair(mmproj, None)
            llama = model
        else:
            check_pair(mmproj, model, n_ctx)
            llama = self._owned = open_llama(
                model,
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_threads=self._threads,
                n_threads_batch=self._threads,
                seed=seed,
                verbose=verbose,
                **settings,
            )
        self._language = LanguageModel(llama)
        self._lock = self._language.turns.lock
        try:
            self._encoder = ImageEncoder(
                mmproj,
                self._language,
                device=encoder_device,
                n_threads=self._threads,
                flash_attn=flash_attn,
                verbose=verbose,
                resize=resize,
            )
            self.cache = EmbeddingCache() if cache is None else cache
            self._tower = ClipTextTower.open(mmproj, device=encoder_device, n_threads=self._threads)
            #: Prefill and decoding; for those in this package who generate by themselves.
            self.answers = Answers(self._language, self._encoder, int(llama.n_batch), self._check_open)
        except QapError:
            self.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None = None,
        mmproj: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> VisionModel:
        """A model from the Hugging Face hub (extra ``hub``); its files go to the hub's cache.

        Args:
            repo_id: ``owner/name``, or ``owner/name:QUANT`` without `filename`.
            filename: the language model's file or a pattern such as ``*Q4_K_M.gguf``; None takes Q4_K_M, or what comes
                close to it.
            mmproj: the same for the mmproj; None takes the one in f16.
            revision: a branch, a tag or a commit.
            cache_dir: another cache than the hub's own.
            settings: those of the constructor.

        Raises:
            ModelFileError: no such repository or file, or no network and no copy in the cache.
            ConfigError: no repository id, or huggingface_hub is not installed.
        """
        from qap_gguf.files.hub import fetch_pair, split_id

        repo, quant = split_id(repo_id)
        if quant is not None and filename is not None:
            raise ConfigError(f"filename: expected none beside the quantization in {repo_id!r}; give one of the two")
        folder = None if cache_dir is None else os.fspath(cache_dir)
        found = fetch_pair(repo, quant=quant, filename=filename, mmproj=mmproj, revision=revision, cache_dir=folder)
        return cls(found.mmproj, found.model, **settings)

    # --- image to tokens ---

    @property
    def language_model(self) -> llama_cpp.Llama:
        """The language model underneath."""
        return self._language.llama

    @property
    def why_not_prunable(self) -> str | None:
        """None when images of this model can be pruned, else one line that says why not."""
        self._check_open()
        return self._encoder.why_not_prunable

    @property
    def file_config(self) -> PruneConfig | None:
        """The ``qap.*`` keys of the mmproj file, None where it has none. :meth:`chat` does not apply them by itself."""
        self._check_open()
        return self._encoder.file_config

    def encode(self, image: ImageSource, prune: PruneConfig | None = None) -> ImageEmbedding:
        """Run the image encoder and the projector over a picture; all tokens come back unless `prune` drops some early.

        A picture that is in :attr:`cache` is not encoded again; its arrays are shared and cannot be written to.

        Args:
            image: a path, the bytes of an image file, a Pillow image, or a uint8 array (height, width, 3).
            prune: what the image will be pruned by; only its ``encoder_keep`` below 1 makes a difference here.

        Raises:
            ImageError: not a picture, damaged, or too large.
            UnsupportedError: this encoder cannot drop tokens early.
            ConfigError: `prune` keeps more tokens than the picture has.
        """
        early = None
        if prune is not None:
            check_config(prune)
            early = prune if prune.encoder_keep < 1 else None
        pixels = load_image(image)
        with self._lock:
            self._check_open()
            hidden = self._tower is not None
            identity = self._encoder.identity(hidden=hidden, lasting=self.cache.folder is not None)
            key = image_key(pixels, early_identity(identity, early))
            found = self.cache.get(key)
            return found or self.cache.put(key, self._encoder.encode(pixels, hidden=hidden, early=early))

    @property
    def n_encodes(self) -> int:
        """How often the image encoder has run."""
        return self._encoder.n_encodes

    def forget(self) -> None:
        """Empty :attr:`cache` (its folder excepted) and the KV cache: the next question does all the work again."""
        with self._lock:
            self._check_open()
            self.cache.clear()
            self._language.reset()

    def score(self, image: ImageEmbedding, cfg: PruneConfig | None = None, prompt: str | None = None) -> Scores:
        """Scores of all tokens of an image; `prompt` is for the signals that look at the question.

        Raises:
            UnsupportedError: `cfg` asks for a signal that this model cannot give.
        """
        return score_image(image, self.signals(image, prompt), PruneConfig() if cfg is None else cfg, self._threads)

    def signals(self, image: ImageEmbedding, prompt: str | None = None) -> Signals:
        """What the semantic relevance of an image can be made of; ``signals(...).available()`` lists the names.

        Raises:
            ImageError: not an ImageEmbedding.
        """
        self._check_open()
        if not isinstance(image, ImageEmbedding):
            raise ImageError(f"expected an ImageEmbedding, got {type(image).__name__}; call encode(image) first")
        check_rows(image)
        return Signals(
            image.tokens, image.attention, image.received, image.hidden, prompt, self._tower, self._language.embedder
        )

    def prune(self, image: ImageEmbedding, cfg: PruneConfig | None = None, prompt: str | None = None) -> PrunedImage:
        """Keep the tokens of an image that score best.

        Args:
            image: from :meth:`encode`.
            cfg: None means ``PruneConfig()``.
            prompt: the question, for signals that look at it.

        Raises:
            ConfigError: ``n_keep`` is larger than the image's tokens.
            UnsupportedError: the model cannot be pruned, or cannot give the signal.
        """
        signals = self.signals(image, prompt)
        why_not = self.why_not_prunable
        if why_not is not None:
            raise UnsupportedError(f"cannot prune this image: {why_not}")
        cfg = PruneConfig() if cfg is None else cfg
        return prune_image(image, signals, cfg, self._threads, mrope=self._encoder.mrope)

    # --- tokens to text ---

    @overload
    def generate(
        self, parts: Sequence[Part], *, stream: Literal[False] = ..., **settings: Unpack[ChatSettings]
    ) -> str: ...
    @overload
    def generate(
        self, parts: Sequence[Part], *, stream: Literal[True], **settings: Unpack[ChatSettings]
    ) -> Generation: ...
    def generate(
        self, parts: Sequence[Part], *, stream: bool = False, **settings: Unpack[ChatSettings]
    ) -> str | Generation:
        """Answer one user turn; the settings are those of :class:`~qap_gguf.generation.settings.ChatSettings`.

        Args:
            parts: images (encoded or not) and texts, in the order of the prompt.
            stream: return a :class:`Generation` that yields the text in pieces, instead of the whole text.

        Example:
            >>> import qap_gguf as qap
            >>> with qap.VisionModel() as vlm:
            ...     vlm.generate([qap.packaged_model().sample, "How many objects are there?"], max_tokens=8)
            'four'
        """
        if isinstance(parts, (str, bytes, os.PathLike)) or not isinstance(parts, Sequence):
            raise ConfigError(
                'parts: expected a list such as [image, "What is this?"], got one thing; put it in a list'
            )
        message = {"role": "user", "content": list(parts)}
        if stream:
            return self.chat([message], stream=True, **settings)
        return self.chat([message], stream=False, **settings)

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = ..., **settings: Unpack[ChatSettings]
    ) -> str: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **settings: Unpack[ChatSettings]
    ) -> Generation: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **settings: Unpack[ChatSettings]
    ) -> str | Generation:
        """Answer the last message of a conversation; the settings are those of ``ChatSettings``.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text or list of images and texts}``.
                Text is a str; a path must therefore be a ``pathlib.Path``, or encoded first.
            stream: return a :class:`Generation` that yields the text in pieces.

        Raises:
            ConfigError: malformed messages or settings, ``n_keep`` above the image's tokens, or a prompt above n_ctx.
            ImageError, UnsupportedError: see :meth:`encode` and :meth:`prune`.
        """
        chosen = AnswerSettings(**settings)
        self._check_open()
        text = TextStream(self._language, chosen.stop)
        flat, sources = flatten(messages)
        images = [part if isinstance(part, ImageEmbedding) else self.encode(part, chosen.prune) for part in sources]
        for image in images:
            check_embedding(image, self._encoder.n_embd)
        stats = GenerationStats()
        with self.answers.turn():
            # Prefill at once: errors belong to this call, not to the first piece.
            number = self._prefill(flat, images, chosen.prune, question_of(messages), stats)
            generation = Generation(self.answers.decode(number, text, stats, chosen), stats)
            return generation if stream else "".join(generation)

    def last_logits(self) -> FloatArray:
        """Logits after the last evaluated token, float32 (n_vocab,): of the first answer token after a prefill."""
        self._check_open()
        logits: FloatArray = self._language.last_logits()
        return logits

    def _prefill(
        self,
        flat: list[dict[str, str]],
        images: list[ImageEmbedding],
        prune: PruneConfig | None,
        question: str,
        stats: GenerationStats,
    ) -> int:
        prompt, add_special = render(self._language, flat)
        pairs = [(image, None if prune is None else self.prune(image, prune, question)) for image in images]
        return self.answers.place(prompt, pairs, stats, add_special=add_special)

    # --- life ---

    def _check_open(self) -> None:
        if self._closed:
            raise QapError("this VisionModel is closed; make a new one")
        if not self._language.is_open:
            raise QapError("the Llama of this VisionModel was closed by its owner; make both anew")

    def close(self) -> None:
        """Free the encoder, and the language model if it was loaded here. Closing twice is fine."""
        with self._lock:
            self._closed = True
            for part in (getattr(self, "_tower", None), getattr(self, "_encoder", None)):
                if part is not None:
                    part.close()
            if self._owned is not None:
                self._owned.close()
                self._owned = None

    def __enter__(self) -> VisionModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
