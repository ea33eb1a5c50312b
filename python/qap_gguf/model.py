"""A vision-language model: an mmproj file and a language model, with pruning between them.

The encoder runs once for an image and gives all its tokens; scores, selection and prefill run for each question.
Design: docs/design.md. Embeddings reach the language model through upstream's own
``mtmd_helper_decode_image_chunk``, so that positions and attention masks are upstream's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import llama_cpp

from qap_gguf.arguments import (
    MOST_IMAGE_TOKENS,
    FloatArray,
    check_flag,
    check_integer,
    check_threads,
    n_threads_default,
)
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError, QapError
from qap_gguf.files.packaged import packaged_model
from qap_gguf.files.trial import admit, check_name
from qap_gguf.generation.answers import Answers, kept_of
from qap_gguf.generation.chat_template import ChatTemplate, open_template
from qap_gguf.generation.messages import images_of, question_of, read_messages
from qap_gguf.generation.settings import AnswerSettings, ChatSettings, Generation, GenerationStats
from qap_gguf.image_side import ImageSide
from qap_gguf.language.llama import LanguageModel, TextStream
from qap_gguf.language.opener import open_language
from qap_gguf.pruning.clip_text import ClipTextTower
from qap_gguf.pruning.prune import check_positions
from qap_gguf.runtime.devices import device_name
from qap_gguf.runtime.fork import check_process, note_threads
from qap_gguf.vision.cache import EmbeddingCache
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.encoder import ImageEncoder
from qap_gguf.vision.images import ImageSource, Pixels, load_image
from qap_gguf.vision.resize import check_resize
from qap_gguf.vision.sources import SourceRules

if TYPE_CHECKING:
    from typing_extensions import Unpack

Message = Mapping[str, Any]
Part = Any  # an ImageEmbedding, an ImageSource, or a str that is text


class VisionModel(ImageSide):
    """An image encoder and a language model that answer questions about pictures.

    Args:
        mmproj: the mmproj file; None with `model` None takes the packaged model.
        model: the language model: a GGUF file, or a loaded ``llama_cpp.Llama`` (which stays the caller's to close).
        device: where the image encoder and the language model run: a ggml device by name or alias, in any case
            ("cpu", "cuda0", "metal", ...; ``qap-gguf info`` lists them); None takes the GPUs there are.
        model_device: another device for the language model; "all" spreads it over all GPUs; None is `device`.
        kv: type of the KV cache, for a model that is loaded here: "f16", "q8_0", ... (``qap-gguf run --help`` lists
            them), each with flash attention; None is f16 without.
        n_ctx: cells of the KV cache, for a model that is loaded here.
        n_threads: CPU threads; None is ``QAP_THREADS``, or one for each physical core that it may use.
        n_batch: tokens of a prefill batch, for a model that is loaded here; raised to the rows of a picture where the
            model reads them in one batch.
        seed: of sampling; None is 0, or the seed of a Llama that is loaded already.
        max_image_tokens: the most tokens of a picture, for families that can make fewer of it by scaling it down or by
            cutting it into fewer tiles; None is ``QAP_MAX_IMAGE_TOKENS`` of the environment, or no limit.
        flash_attn: flash attention in the encoder; None is upstream's choice (on where the device has it).
        resize: how pictures come to the encoder's size, "auto" (as the model was trained), "stretch" or "pad"; None is
            that of :func:`~qap_gguf.set_resize`.
        force_family: prune also a model whose family was not compared with its original here (docs/models.md), with a
            warning; False leaves it to ``QAP_FORCE_FAMILY`` of the environment.
        positions: "keep" makes a file at `model` one that can keep image tokens at their places: its relabelled copy is
            made once, in the cache folder. "auto" takes the file as it is. Which positions are used says PruneConfig.
        cache: where encoded images are kept, so that each is encoded once; None is a cache of its own, in memory.
        check: what files have to pass before they are loaded: "gate" reads their headers; "child" also loads them in a
            process of its own, which upstream's assertions may end, unless they passed before; "none" trusts them.
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
        kv: str | None = None,
        n_ctx: int = 2048,
        n_threads: int | None = None,
        n_batch: int = 512,
        seed: int | None = None,
        max_image_tokens: int | None = None,
        flash_attn: bool | None = None,
        resize: str | None = None,
        force_family: bool = False,
        positions: str = "auto",
        cache: EmbeddingCache | None = None,
        check: str = "gate",
        verbose: bool = False,
    ) -> None:
        check_name(check)
        if (mmproj is None) != (model is None):
            raise ConfigError("mmproj and model: expected both or none (the packaged model), got one; pass the other")
        check_integer("n_ctx", n_ctx, 1)
        check_integer("n_batch", n_batch, 1)
        if seed is not None:
            check_integer("seed", seed, 0)
        if max_image_tokens is not None:
            check_integer("max_image_tokens", max_image_tokens, 1, MOST_IMAGE_TOKENS)
        check_threads(n_threads)
        if flash_attn is not None and not isinstance(flash_attn, bool):
            raise ConfigError(f"flash_attn: expected True, False or None, got {flash_attn!r}; choose one of these")
        check_flag("force_family", force_family)
        resize = None if resize is None else check_resize(resize)
        wanted = PruneConfig(positions=positions)  # raises ConfigError
        if mmproj is None or model is None:
            packaged = packaged_model()
            mmproj, model = packaged.mmproj, packaged.model

        self._mmproj = os.fspath(mmproj)
        self._threads = n_threads or n_threads_default()
        check_process(self._threads)
        self._closed = False
        encoder_device = device_name(device)
        model_place = device if model_device is None else model_device
        self._owned: llama_cpp.Llama | None = None
        if isinstance(model, llama_cpp.Llama):
            for name, given in (("model_device", model_device), ("kv", kv)):
                if given is not None:
                    raise ConfigError(
                        f"{name}: expected None for a Llama that is loaded already, got {given!r}; "
                        "pass the model's path, or load the Llama with it"
                    )
            admit(mmproj, None, check=check)
            llama = model
        else:
            if positions == "keep":
                admit(mmproj, model, n_ctx, check)
                from qap_gguf.convert.relabel.cache import relabelled_copy

                model = relabelled_copy(model)
            llama = self._owned = open_language(
                model,
                mmproj,
                device=model_place,
                kv=kv,
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_threads=self._threads,
                seed=seed or 0,
                check=check,
                verbose=verbose,
            )
        self._language = LanguageModel(llama)
        note_threads(self._threads)
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
                max_tokens=max_image_tokens,
                force_family=force_family,
            )
            check_positions(wanted, self._encoder.places)
            self.cache = EmbeddingCache() if cache is None else cache
            self._tower = ClipTextTower.open(mmproj, device=encoder_device, n_threads=self._threads)
            #: Prefill and decoding; for those in this package who generate by themselves.
            self.answers = Answers(self._language, self._encoder, int(llama.n_batch), self._check_open, seed)
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

    @property
    def language_model(self) -> llama_cpp.Llama:
        """The language model underneath."""
        return self._language.llama

    def forget(self) -> None:
        """Empty :attr:`cache` (its folder excepted) and the KV cache: the next question does all the work again."""
        with self._lock:
            self._check_open()
            self.cache.clear()
            self._language.reset()

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
            ...     vlm.generate([qap.packaged_model().sample, "How many objects are there?"], prune=None)
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
            messages: OpenAI-style, ``{"role": "user", "content": text or list of images and texts}``. A str is text; a
                path must therefore be a ``pathlib.Path``, or encoded first. Images have every form of docs/chat.md.
            stream: return a :class:`Generation` that yields the text in pieces.

        Raises:
            ConfigError: malformed messages or settings, or a prompt above n_ctx.
            ImageError, UnsupportedError: see :meth:`encode` and :meth:`prune`.
        """
        chosen = AnswerSettings(**settings)
        self._check_open()
        cfg = self.choose(chosen.prune)
        text = TextStream(self._language, chosen.stop)
        turns = read_messages(messages)
        prompt = self._template.render(turns)
        pictures = [part if isinstance(part, ImageEmbedding) else self._load(part) for part in images_of(turns)]
        images = self.encode_fitting(prompt.text, True, pictures, cfg)
        stats = GenerationStats()
        with self.answers.turn():
            # Prefill at once: errors belong to this call, not to the first piece.
            question = question_of(turns)
            pairs = [(image, None if cfg is None else self.prune(image, cfg, question)) for image in images]
            number = self.answers.place(prompt.text, pairs, stats, add_special=True)
            kept = [kept_of(image, cut) for image, cut in pairs]
            generation = Generation(self.answers.decode(number, text, stats, chosen), stats, kept)
            return generation if stream else "".join(generation)

    def last_logits(self) -> FloatArray:
        """Logits after the last evaluated token, float32 (n_vocab,): of the first answer token after a prefill."""
        self._check_open()
        logits: FloatArray = self._language.last_logits()
        return logits

    @staticmethod
    def _load(source: ImageSource) -> Pixels:
        """An image of a message: a str is the URL or the path of an ``image_url`` part."""
        return load_image(SourceRules().load(source) if isinstance(source, str) else source)

    @cached_property
    def _template(self) -> ChatTemplate:
        return open_template(self._language, self._mmproj)

    # --- life ---

    def __repr__(self) -> str:
        if self._closed or not self._language.is_open:
            return "VisionModel(closed)"
        model = Path(str(self.language_model.model_path)).name
        return f"VisionModel({self._encoder.path.name}, {model}, n_ctx={self._language.n_ctx})"

    def _check_open(self) -> None:
        check_process(self._threads)
        if self._closed:
            raise QapError("this VisionModel is closed; make a new one")
        if not self._language.is_open:
            raise QapError("the Llama of this VisionModel was closed by its owner; make both anew")
        self._language.check_process()

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
