"""Default pruning for everything that runs through libmtmd, stock llama-cpp-python chat handlers included.

What a prompt's images get when it is tokenized: the innermost :func:`use` of the thread, else :func:`set_default`,
else the environment (``QAP_N_KEEP`` and the like), else the ``qap.*`` keys of the mmproj file. Else stock handlers keep
all tokens, for an import must not change their answers, while what is ours (:class:`~qap_gguf.VisionModel`,
:class:`~qap_gguf.ChatHandler`, the commands) prunes by ``PruneConfig()``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Final

from qap_gguf import _core
from qap_gguf.config import LEVELS, PruneConfig, shortest
from qap_gguf.errors import ConfigError, UnsupportedError


class Unset:
    """Says that an argument was left out, where None has a meaning of its own."""

    def __repr__(self) -> str:
        return "unset"


UNSET: Final = Unset()

_default: PruneConfig | None = None
_blocks = threading.local()  # .open: (owner or None for all, config) of each block that this thread is in


def check_config(cfg: object) -> None:
    """`cfg` is a PruneConfig (which has checked its own fields)."""
    if not isinstance(cfg, PruneConfig):
        raise ConfigError(f"expected a PruneConfig, got {type(cfg).__name__}; make one with qap_gguf.PruneConfig(...)")


def to_params(cfg: PruneConfig) -> _core.Params:
    """The native form of a config."""
    check_config(cfg)
    return cfg.to_params()


def check_weights(cfg: PruneConfig, known: bool, mmproj: str | os.PathLike[str] = "the mmproj file") -> None:
    """The channel weights are `known` where `cfg` asks for them.

    Raises:
        UnsupportedError: they are not.

    Example:
        >>> check_weights(PruneConfig(), known=False)
    """
    if cfg.error == "model" and not known:
        raise UnsupportedError(
            f"error: expected channel weights in {os.fspath(mmproj)} for model, found none; write them with qap-gguf "
            "convert --annotate MMPROJ OUT --error model --imatrix FILE, or choose int4"
        )


def from_params(params: _core.Params) -> PruneConfig:
    """The config of native parameters; single-precision numbers get back the decimals that were meant."""
    values = params.to_dict()
    dynamic = values.pop("alpha_dynamic")
    if values["n_keep"]:
        values["keep_ratio"] = None
    else:
        values["n_keep"] = None
    values["encoder_layer"] = values["encoder_layer"] or None
    values |= {name: None for name in LEVELS if values[name] < 0}
    for name in ("alpha", "outlier_weight"):
        values[name] = shortest(values[name])
    return PruneConfig.from_dict(values | ({"alpha": "dynamic"} if dynamic else {}))


def set_default(cfg: PruneConfig | None) -> None:
    """Prune every image that libmtmd tokenizes from now on, in all threads; None takes that back.

    None leaves files with ``qap.*`` keys to their own defaults. To keep all tokens of those as well, pass
    ``PruneConfig(keep_ratio=1.0)``; only padding is dropped then, see ``ImageEmbedding.padding``.

    Raises:
        ConfigError: `cfg` is neither a PruneConfig nor None.

    Example:
        >>> import qap_gguf as qap
        >>> qap.set_default(qap.PruneConfig(keep_ratio=0.25))
        >>> qap.get_default().keep_ratio
        0.25
        >>> qap.set_default(None)
    """
    global _default  # noqa: PLW0603 - one setting for the process is what it is
    _core.set_default(None if cfg is None else to_params(cfg))
    _default = cfg


def get_default() -> PruneConfig | None:
    """The config of the last :func:`set_default`, else that of the environment, else None.

    The environment is read anew at each call: ``QAP_N_KEEP``, ``QAP_KEEP_RATIO``, ``QAP_ALPHA``, ``QAP_SELECT`` and so
    on, a variable for each field of a PruneConfig. Any of them turns pruning on; the others keep their defaults.

    Raises:
        ConfigError: a variable has a value that cannot be.
    """
    if _default is not None:
        return _default
    try:
        params = _core.environment()
    except ValueError as err:
        raise ConfigError(str(err)) from err
    return None if params is None else from_params(params)


def set_image_cache(megabytes: int | None) -> None:
    """How much each encoder keeps of the pictures that it encoded, for stock handlers and other users of libmtmd.

    A picture that comes again is not encoded again: its rows are pruned anew. A :class:`~qap_gguf.VisionModel` and a
    :class:`~qap_gguf.ChatHandler` have a cache of their own (:class:`~qap_gguf.EmbeddingCache`) instead.

    Args:
        megabytes: the most for each encoder; 0 keeps nothing; None is ``QAP_IMAGE_CACHE_MB``, or 256.

    Raises:
        ConfigError: not a whole number from 0.

    Example:
        >>> import qap_gguf as qap
        >>> qap.set_image_cache(64)
        >>> qap.set_image_cache(None)
    """
    if megabytes is not None and (type(megabytes) is not int or not 0 <= megabytes < 1 << 40):
        raise ConfigError(f"megabytes: expected a whole number from 0, or None, got {megabytes!r}; 0 keeps nothing")
    _core.image_cache_limit(-1 if megabytes is None else megabytes << 20)


@contextlib.contextmanager
def use(cfg: PruneConfig | None) -> Iterator[None]:
    """Within the block, and in this thread only, prune by `cfg`, or not at all for None.

    Raises:
        ConfigError: `cfg` is neither a PruneConfig nor None.

    Example:
        >>> import qap_gguf as qap
        >>> with qap.use(qap.PruneConfig(n_keep=32)):
        ...     pass    # llama.create_chat_completion(...) with a stock chat handler
    """
    _core.push_override(None if cfg is None else to_params(cfg))
    try:
        with block(None, cfg):
            yield
    finally:
        _core.pop_override()


@contextlib.contextmanager
def block(owner: object, cfg: PruneConfig | None) -> Iterator[None]:
    """Within the block, and in this thread only, `owner` (None: everyone here in Python) prunes by `cfg`."""
    if cfg is not None:
        check_config(cfg)
    opened: list[tuple[object, PruneConfig | None]] = _blocks.__dict__.setdefault("open", [])
    opened.append((owner, cfg))
    try:
        yield
    finally:
        opened.pop()


def innermost(owner: object, otherwise: PruneConfig | None) -> PruneConfig | None:
    """The config of the innermost :func:`use` or :func:`block` of this thread that holds for `owner`."""
    for whose, cfg in reversed(_blocks.__dict__.get("open", ())):
        if whose is None or whose is owner:
            return cfg  # type: ignore[no-any-return]
    return otherwise
