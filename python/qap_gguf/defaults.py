"""Default pruning for everything that runs through libmtmd, stock llama-cpp-python chat handlers included.

What a prompt's images get when it is tokenized: the innermost :func:`use` of the thread, else :func:`set_default`,
else the ``qap.*`` keys of the mmproj file, else nothing (all tokens are kept).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from qap_gguf import _core
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError

_default: PruneConfig | None = None
_blocks = threading.local()  # .open: (owner or None for all, config) of each block that this thread is in


def check_config(cfg: object) -> None:
    """`cfg` is a PruneConfig (which has checked its own fields)."""
    if not isinstance(cfg, PruneConfig):
        raise ConfigError(f"expected a PruneConfig, got {type(cfg).__name__}; make one with qap_gguf.PruneConfig(...)")


def to_params(cfg: PruneConfig) -> _core.Params:
    """The native form of a config."""
    check_config(cfg)
    dynamic = cfg.alpha == "dynamic"
    return _core.Params(
        keep_ratio=1.0 if cfg.keep_ratio is None else cfg.keep_ratio,
        n_keep=cfg.n_keep or 0,
        alpha=0.5 if isinstance(cfg.alpha, str) else cfg.alpha,
        alpha_dynamic=dynamic,
        error=cfg.error,
        group_size=cfg.group_size,
        outlier=cfg.outlier,
        outlier_weight=cfg.outlier_weight,
        semantic=cfg.semantic,
        select=cfg.select,
        positions=cfg.positions,
        merge=cfg.merge,
        seed=cfg.seed,
        encoder_layer=cfg.encoder_layer or 0,
        encoder_keep=cfg.encoder_keep,
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
    for name in ("alpha", "outlier_weight"):
        values[name] = float(f"{values[name]:.7g}")
    return PruneConfig.from_dict(values | ({"alpha": "dynamic"} if dynamic else {}))


def set_default(cfg: PruneConfig | None) -> None:
    """Prune every image that libmtmd tokenizes from now on, in all threads; None takes that back.

    None leaves files with ``qap.*`` keys to their own defaults. To keep all tokens of those as well, pass
    ``PruneConfig(keep_ratio=1.0)``.

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
    """The config of the last :func:`set_default`, or None."""
    return _default


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
