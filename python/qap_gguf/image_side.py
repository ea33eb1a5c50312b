"""The image side of a vision model: pictures to tokens, tokens to scores, scores to the tokens that are kept."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

from qap_gguf import _core, defaults
from qap_gguf.config import PruneConfig
from qap_gguf.defaults import Unset, check_config
from qap_gguf.errors import ConfigError, ImageError, UnsupportedError
from qap_gguf.generation.answers import Answers
from qap_gguf.language.llama import LanguageModel
from qap_gguf.pruning.clip_text import ClipTextTower
from qap_gguf.pruning.prune import PrunedImage, prune_image, score_image
from qap_gguf.pruning.relevance import Signals
from qap_gguf.pruning.score import Scores
from qap_gguf.vision.cache import EmbeddingCache, early_identity, image_key
from qap_gguf.vision.embedding import ImageEmbedding, check_embedding, check_rows
from qap_gguf.vision.encoder import ImageEncoder
from qap_gguf.vision.images import ImageSource, Pixels, load_image


class ImageSide(ABC):
    """What :class:`~qap_gguf.VisionModel` does with pictures; its constructor sets what is declared here.

    Attributes:
        answers: prefill and decoding; for those in this package who generate by themselves.
        cache: where encoded images are kept.
    """

    answers: Answers
    cache: EmbeddingCache
    _encoder: ImageEncoder
    _language: LanguageModel
    _lock: threading.RLock
    _threads: int
    _tower: ClipTextTower | None

    @abstractmethod
    def _check_open(self) -> None: ...

    @property
    def why_not_prunable(self) -> str | None:
        """None when images of this model can be pruned, else one line that says why not."""
        self._check_open()
        return self._encoder.why_not_prunable

    @property
    def file_config(self) -> PruneConfig | None:
        """The ``qap.*`` keys of the mmproj file, None where it has none."""
        self._check_open()
        return self._encoder.file_config

    @property
    def default_prune(self) -> PruneConfig | None:
        """How images are pruned where nobody says how: by :func:`~qap_gguf.set_default`, else the environment, else the
        ``qap.*`` keys of the mmproj file, else ``PruneConfig()``. None keeps all tokens: the model cannot be pruned.

        Raises:
            ConfigError: a variable of the environment has a value that cannot be.
        """
        given = defaults.get_default() or self.file_config
        return PruneConfig() if given is None and self.why_not_prunable is None else given

    def choose(
        self, asked: PruneConfig | Unset | None, owner: object = None, own: PruneConfig | None = None
    ) -> PruneConfig | None:
        """How the images of a call are pruned; for those in this package who answer by themselves.

        Args:
            asked: of the call; None keeps all tokens.
            owner: whose blocks of :func:`~qap_gguf.defaults.block` hold; None is this model.
            own: the owner's setting, before :attr:`default_prune`.

        Raises:
            ConfigError: `asked` is no PruneConfig, or as for :attr:`default_prune`.
        """
        if isinstance(asked, Unset):
            asked = defaults.innermost(self if owner is None else owner, own or self.default_prune)
        elif asked is not None:
            check_config(asked)
        return None if _core.disabled() else asked

    def encode(self, image: ImageSource, prune: PruneConfig | None = None) -> ImageEmbedding:
        """Run the image encoder and the projector over a picture; all tokens come back, none is pruned.

        A picture that is in :attr:`cache` is not encoded again; its arrays are shared and cannot be written to.

        Args:
            image: a path, the bytes of an image file, a Pillow image, or a uint8 array (height, width, 3).
            prune: how it will be pruned. It matters only where ``prune.drops_early``: the encoder leaves tokens out
                then, and later prunings can only choose among ``ImageEmbedding.kept_early``.

        Raises:
            ImageError: not a picture, damaged, or too large.
            ConfigError: `prune` is no PruneConfig, or names a layer that the encoder does not have.
            UnsupportedError: this encoder cannot drop tokens early.

        Example:
            >>> import qap_gguf as qap
            >>> with qap.VisionModel() as vlm:
            ...     image = vlm.encode(qap.packaged_model().sample, qap.PruneConfig(encoder_keep=0.5))
            >>> image.n_tokens, image.n_left
            (144, 72)
        """
        return self._encode(load_image(image), prune)

    def _encode(self, pixels: Pixels, prune: PruneConfig | None = None) -> ImageEmbedding:
        self._check_open()
        if prune is not None:
            check_config(prune)
        early = prune if prune is not None and prune.drops_early else None
        with self._lock:
            self._check_open()
            hidden = self._tower is not None
            identity = self._encoder.identity(hidden=hidden, lasting=self.cache.folder is not None)
            key = image_key(pixels, early_identity(identity, early))
            found = self.cache.get(key)
            if found is None:
                found = self.cache.put(key, self._encoder.encode(pixels, hidden=hidden, early=early))
                self.answers.fresh.add(found)
            return found

    @property
    def n_encodes(self) -> int:
        """How often the image encoder has run."""
        return self._encoder.n_encodes

    def load_fitting(self, images: Sequence[ImageSource], prune: PruneConfig | None, text: str = "") -> list[Pixels]:
        """Read pictures for :meth:`encode`, unless they and `text` cannot fit the context.

        Args:
            images: as :meth:`encode` takes them.
            prune: how they will be pruned; None keeps all tokens.
            text: what will be asked.

        Raises:
            ImageError: not a picture, damaged, too large, or more tokens than `max_image_tokens`.
            ConfigError: they do not fit.
            UnsupportedError: this encoder cannot leave out what `prune` asks for.
        """
        self._check_open()
        pictures = [load_image(image) for image in images]
        marker = _core.media_marker()
        self._check_fit(marker * len(pictures) + text.replace(marker, ""), True, pictures, prune)
        return pictures

    def _check_fit(
        self, prompt: str, add_special: bool, pictures: Sequence[ImageEmbedding | Pixels], prune: PruneConfig | None
    ) -> None:
        sizes: list[tuple[int, int]] = []
        left: list[int | None] = []
        for picture in pictures:
            if isinstance(picture, ImageEmbedding):
                sizes.append(picture.size)
                left.append(int((~picture.dropped).sum()) if prune is None else picture.n_left)
            else:
                sizes.append((picture.shape[1], picture.shape[0]))
                left.append(None)
        try:
            self.answers.check_fit(prompt, sizes, left, prune, add_special=add_special)
        except ConfigError:
            # what the pixels leave out is found only where it may help: each picture is brought to its size for that
            for i, picture in enumerate(pictures):
                if not isinstance(picture, ImageEmbedding):
                    left[i] = self._encoder.count_left(picture, prune)
            self.answers.check_fit(prompt, sizes, left, prune, add_special=add_special)

    def encode_fitting(
        self, prompt: str, add_special: bool, pictures: Sequence[ImageEmbedding | Pixels], prune: PruneConfig | None
    ) -> list[ImageEmbedding]:
        """The pictures of a prompt, encoded where they are not; for those in this package who prefill by themselves.

        Raises:
            ConfigError: with them the prompt does not fit; none was encoded.
            ImageError: a picture has more tokens than `max_image_tokens`, or was encoded by another model; likewise.
            ArrayError: an embedding with features that are not finite, or of another shape or type.
            UnsupportedError: this encoder cannot leave out what `prune` asks for.
        """
        self._check_open()
        for picture in pictures:
            if isinstance(picture, ImageEmbedding):
                check_embedding(picture, self._encoder.n_embd)
        self._check_fit(prompt, add_special, pictures, prune)
        return [p if isinstance(p, ImageEmbedding) else self._encode(p, prune) for p in pictures]

    def score(self, image: ImageEmbedding, cfg: PruneConfig | None = None, prompt: str | None = None) -> Scores:
        """Scores of all tokens of an image; `prompt` is for the signals that look at the question.

        Raises:
            UnsupportedError: `cfg` asks for a signal that this model cannot give, or for weights that its file lacks.
        """
        signals, weights = self.signals(image, prompt), self._encoder.channel_weights
        return score_image(image, signals, PruneConfig() if cfg is None else cfg, self._threads, weights)

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
            UnsupportedError: the model cannot be pruned, or cannot give the signal; its file lacks weights for error
                "model".
        """
        signals = self.signals(image, prompt)
        why_not = self.why_not_prunable
        if why_not is not None:
            raise UnsupportedError(f"cannot prune this image: {why_not}")
        cfg = PruneConfig() if cfg is None else cfg
        weights = self._encoder.channel_weights
        return prune_image(image, signals, cfg, self._threads, places=self._encoder.places, channel_weights=weights)
