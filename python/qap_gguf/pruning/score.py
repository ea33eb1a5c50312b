"""Scores of image tokens and their selection, on NumPy arrays: the native code that also runs inside the encoder.

The formulas and their sources are in docs/method.md; :mod:`qap_gguf.reference` computes the same in NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qap_gguf import _core
from qap_gguf.arguments import FloatArray, IndexArray, check_array, check_threads, n_threads_default
from qap_gguf.config import SELECTORS, PruneConfig
from qap_gguf.defaults import to_params
from qap_gguf.errors import ArrayError, ConfigError, NativeError
from qap_gguf.runtime.devices import device_name


@dataclass(frozen=True)
class Scores:
    """Scores of one image's tokens; every array is float32 of shape (n_tok,).

    Attributes:
        error: E, the quantization error, >= 0, in the unit of the features.
        outlier: R, the outlier magnitude, >= 0, in the unit of the features.
        sensitivity: Q in [0, 1], min-max normalised E and R, weighted.
        semantic: P in [0, 1], min-max normalised relevance; zeros without a signal.
        alpha: the weight of P that was used.
        total: S = alpha P + (1 - alpha) Q in [0, 1]; higher is kept first.
        padding: which tokens are padding, bool (n_tok,): those have scores of 0, and the statistics are over the
            others; None where no token is.
        dropped: which tokens the encoder dropped early, bool (n_tok,), likewise; None where it dropped none.
        grid: (rows, columns) of the tokens in the picture, where they are an encoded image's; None otherwise.
    """

    error: FloatArray
    outlier: FloatArray
    sensitivity: FloatArray
    semantic: FloatArray
    alpha: float
    total: FloatArray
    padding: npt.NDArray[np.bool_] | None = None
    dropped: npt.NDArray[np.bool_] | None = None
    grid: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"Scores({len(self.total)} tokens, alpha {self.alpha:.3g})"

    def _repr_png_(self) -> bytes | None:
        """For notebooks: a map of the total score; nothing where the place of the tokens is not known."""
        from qap_gguf.vision.notebook import scores_png
        from qap_gguf.vision.overlay import is_grid

        if self.grid is None or not is_grid(self.grid) or self.grid[0] * self.grid[1] != len(self.total):
            return None
        return scores_png(self.total, self.grid)

    def _repr_html_(self) -> str | None:
        from qap_gguf.vision.notebook import as_html

        return as_html(self._repr_png_(), f"{self!r}: total, from {self.total.min():.3g} to {self.total.max():.3g}")


def score(
    x: FloatArray,
    cfg: PruneConfig | None = None,
    semantic: FloatArray | None = None,
    *,
    channel_weights: FloatArray | None = None,
    device: str | None = None,
    n_threads: int | None = None,
) -> Scores:
    """Score the tokens of one image (QAPruner, arXiv 2604.02816; docs/method.md).

    Args:
        x: what the projector gives the language model, float32 (n_tok, n_embd), C order, finite, |x| <= 1e30.
        cfg: which scores, and how they are fused; None means ``PruneConfig()``.
        semantic: relevance of each token before normalisation, float32 (n_tok,), for instance
            ``ImageEmbedding.attention``; None counts as zeros, for scores over several settings of the same image.
        channel_weights: for ``error="model"``: how important each channel is to the language model, float32 (n_embd,),
            from 0 in any unit, not all 0, see :func:`~qap_gguf.convert.channel_weights`.
        device: a ggml device by name or alias, in any case (``qap-gguf info`` lists them); None is the CPU.
        n_threads: CPU threads at most (int errors take one); None is a core each.

    Raises:
        ArrayError: wrong dtype, shape, order, or values that are not finite or above 1e30.
        ConfigError: `cfg` asks for what these arguments cannot give, or `device` is unknown.

    Example:
        >>> import numpy as np, qap_gguf as qap
        >>> x = np.random.default_rng(0).standard_normal((144, 256)).astype("float32")
        >>> qap.score(x, qap.PruneConfig(alpha=0.0)).total.shape
        (144,)
    """
    cfg = PruneConfig() if cfg is None else cfg
    params = to_params(cfg)
    check_array("x", x, 2)
    if semantic is not None:
        check_array("semantic", semantic, 1)
        if semantic.shape[0] != x.shape[0]:
            raise ArrayError(f"semantic: expected shape ({x.shape[0]},), got {semantic.shape}; one number per token")
    if (cfg.error == "model") != (channel_weights is not None):
        got, cure = ("none", "pass them") if channel_weights is None else ("some", "leave them out")
        raise ConfigError(f'channel_weights: expected them with error="model" and with no other, got {got}; {cure}')
    if channel_weights is not None:
        check_array("channel_weights", channel_weights, 1)
    check_threads(n_threads)
    name = device_name(device)
    try:
        found = _core.score(x, semantic, params, name, n_threads or n_threads_default(), channel_weights)
    except ValueError as err:
        raise ArrayError(str(err)) from err
    except RuntimeError as err:
        raise NativeError(str(err)) from err
    result = Scores(**found)
    if not math.isfinite(result.alpha) or not np.isfinite(result.total).all():
        raise NativeError("expected finite scores, got others; please report this with the features")
    return result


def select(
    total: FloatArray,
    n_keep: int,
    features: FloatArray | None = None,
    method: str = "topk",
    seed: int = 0,
) -> IndexArray:
    """Choose exactly `n_keep` tokens; the indices come back int32 (n_keep,), sorted ascending.

    Args:
        total: scores, float32 (n_tok,), finite; "random" and "uniform" use only its length.
        n_keep: K in 1..n_tok.
        features: float32 (n_tok, n_embd); "dpp", "divprune" and "coverage" compare tokens by them.
        method: one of ``qap_gguf.config.SELECTORS``: "topk" (ties go to the lower index), "dpp" (scores and diversity),
            "divprune" (diversity alone), "coverage" (what stands for most of the picture), "random" (seeded),
            "uniform".
        seed: of "random", 0..2**64-1.

    Raises:
        ArrayError: wrong dtype, shape, order, or values that are not finite.
        ConfigError: `n_keep`, `method` or `seed` is outside its range.

    Example:
        >>> import numpy as np, qap_gguf as qap
        >>> qap.select(np.array([0.1, 0.9, 0.9, 0.3], dtype="float32"), 2).tolist()
        [1, 2]
    """
    check_array("total", total, 1)
    n_tokens = total.shape[0]
    if features is not None:
        check_array("features", features, 2)
        if features.shape[0] != n_tokens:
            raise ArrayError(f"features: expected ({n_tokens}, n_embd), got {features.shape}; one row per token")
    if isinstance(n_keep, bool) or not isinstance(n_keep, (int, np.integer)) or not 1 <= n_keep <= n_tokens:
        raise ConfigError(f"n_keep: expected an integer in 1..{n_tokens}, got {n_keep!r}; choose one in that range")
    if method not in SELECTORS:
        raise ConfigError(f"method: expected one of {', '.join(SELECTORS)}, got {method!r}; choose one of these")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed: expected an integer in 0..2**64-1, got {seed!r}; choose one in that range")
    table = None
    if needs_cosines(method):
        if features is None:
            raise ConfigError(f"features: {method} compares tokens, got None; pass the features")
        if _core.selects_by_rows(method, n_tokens):
            return _select_by_rows(total, features, int(n_keep))
        table = cosines(features)
    return select_by(total, table, int(n_keep), method, int(seed))


def _select_by_rows(total: FloatArray, features: FloatArray, n_keep: int) -> IndexArray:
    try:
        return _core.select_by_rows(features, total, n_keep, n_threads_default())
    except ValueError as err:
        raise ArrayError(str(err)) from err


def needs_cosines(method: str) -> bool:
    """Whether a selector compares tokens with each other."""
    return _core.needs_cosines(method)


def cosines(x: FloatArray, *, device: str | None = None, n_threads: int | None = None) -> FloatArray:
    """Cosines between all tokens, float32 (n_tok, n_tok); a token of zeros has cosine 0 with every token.

    Raises:
        ArrayError: wrong dtype, shape, order, or values that are not finite or above 1e30.

    Example:
        >>> import numpy as np, qap_gguf as qap
        >>> from qap_gguf.pruning.score import cosines
        >>> cosines(np.array([[3.0, 4.0], [0.0, 2.0]], dtype="float32")).round(2)
        array([[1. , 0.8],
               [0.8, 1. ]], dtype=float32)
    """
    check_array("x", x, 2)
    check_threads(n_threads)
    name = device_name(device)
    try:
        return _core.cosines(x, name, n_threads or n_threads_default())
    except ValueError as err:
        raise ArrayError(str(err)) from err


def select_by(total: FloatArray, table: FloatArray | None, n_keep: int, method: str, seed: int) -> IndexArray:
    """:func:`select` with the cosines at hand, for callers that need them for more than this."""
    try:
        return _core.select(total, table, total.shape[0], n_keep, method, seed)
    except ValueError as err:
        raise ArrayError(str(err)) from err


def merge_average(x: FloatArray, table: FloatArray, indices: IndexArray) -> FloatArray:
    """Kept rows with each dropped token averaged into its most similar kept one, float32 (k, n_embd).

    Ours, beyond the paper (docs/method.md, section 8).

    Args:
        x: all tokens, float32 (n_tok, n_embd).
        table: their :func:`cosines`, float32 (n_tok, n_tok).
        indices: kept tokens, int32 (k,), ascending.

    Raises:
        ArrayError: shapes or indices do not fit each other.

    Example:
        >>> import numpy as np
        >>> from qap_gguf.pruning.score import cosines, merge_average
        >>> x = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]], dtype="float32")
        >>> merge_average(x, cosines(x), np.array([0, 2], dtype="int32")).tolist()
        [[2.0, 0.0], [0.0, 5.0]]
    """
    check_array("x", x, 2)
    check_array("table", table, 2)
    if not isinstance(indices, np.ndarray) or indices.dtype != np.int32 or indices.ndim != 1:
        raise ArrayError("indices: expected an int32 array (k,), got another; use numpy.asarray(..., 'int32')")
    try:
        return _core.merge_average(x, table, indices)
    except ValueError as err:
        raise ArrayError(str(err)) from err
