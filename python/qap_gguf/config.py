"""What to keep and how to choose it: :class:`PruneConfig` and the tables of allowed values.

The settings are those of QAPruner (arXiv 2604.02816, section 3): the balance ``alpha``, the group size 128, the int4
error and the range as outlier magnitude. Names, their order and the defaults are those of the native library
(native/src/params.cpp), which are stated nowhere else. Everything is checked when a config is made, so that no bad
value reaches native code.
"""

from __future__ import annotations

import dataclasses
import numbers
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from qap_gguf import _core
from qap_gguf.errors import ConfigError

__all__ = [
    "ERRORS",
    "GGML_ERRORS",
    "INT_ERRORS",
    "MERGES",
    "METADATA_TYPES",
    "OUTLIERS",
    "POSITIONS",
    "SELECTORS",
    "SEMANTICS",
    "PruneConfig",
]

ERRORS: Final = _core.names("error")
INT_ERRORS: Final = tuple(name for name in ERRORS if name.startswith("int"))
GGML_ERRORS: Final = tuple(name for name in ERRORS if name not in (*INT_ERRORS, "model"))
OUTLIERS: Final = _core.names("outlier")
SEMANTICS: Final = _core.names("semantic")
SELECTORS: Final = _core.names("select")
POSITIONS: Final = _core.names("positions")
MERGES: Final = _core.names("merge")

METADATA_VERSION: Final = 1
#: In an mmproj file, an array of f32: how important each channel of a token is to the language model, for the error
#: "model". It belongs to the model, not to a config.
WEIGHTS_KEY: Final = "qap.channel_weights"
#: GGUF value type of each key that :meth:`PruneConfig.to_metadata` writes.
METADATA_TYPES: Final[Mapping[str, str]] = {
    "qap.version": "u32", "qap.keep_ratio": "f32", "qap.n_keep": "u32", "qap.alpha": "f32", "qap.alpha_dynamic": "bool",
    "qap.error": "string", "qap.group_size": "u32", "qap.outlier": "string", "qap.outlier_weight": "f32",
    "qap.semantic": "string", "qap.select": "string", "qap.positions": "string", "qap.merge": "string",
    "qap.encoder_keep": "f32", "qap.encoder_layer": "u32", "qap.skip_flat_tiles": "u32", "qap.duplicates": "u32",
}  # fmt: skip
#: Fields that are a difference of pixels in 0..255; None is -1 in the native library.
LEVELS: Final = ("skip_flat_tiles", "duplicates")

_MAX_I32: Final = 2**31 - 1
_MAX_U64: Final = 2**64 - 1


def _as_int(name: str, value: object, low: int, high: int) -> int:
    """Return `value` as int in low..high, or raise. bool is refused: True is nobody's idea of a count."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise ConfigError(f"{name} must be an integer in {low}..{high}, got {value!r}; choose one in that range")


def _as_float(name: str, value: object, allowed: str, *, low_open: bool = False) -> float:
    """Return `value` as float in [0, 1], or in (0, 1] with `low_open`; `allowed` names the range in the message."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        # NaN fails both comparisons.
        if (number > 0.0 if low_open else number >= 0.0) and number <= 1.0:
            return number
    raise ConfigError(f"{name} must be {allowed}, got {value!r}; choose one in that range")


def _as_choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`, or raise with the list."""
    choices = tuple(allowed)
    if isinstance(value, str) and value in choices:
        return str(value)
    raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}; choose one of these")


def _from_f32(value: object) -> object:
    """The shortest decimal that rounds to a float32: 0.1, stored as 0.10000000149, comes back as 0.1.

    Without this, ceil(ratio * N) of a stored ratio could be one token more than that of the ratio which was asked for.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, numbers.Integral) or not abs(float(value)) <= 1e30:
        return value
    stored = struct.pack("<f", float(value))
    shortest = (float(f"{float(value):.{digits}g}") for digits in range(1, 10))
    return next((short for short in shortest if struct.pack("<f", short) == stored), value)


def shortest(value: float) -> float:
    """The number that a float32 stands for: 0.7, stored as 0.699999988, comes back as 0.7."""
    return float(f"{value:.7g}")


_NATIVE: Final[Mapping[str, Any]] = _core.default_params().to_dict()


@dataclass(frozen=True)
class PruneConfig:
    """How many image tokens to keep, and by which score. Padding is no token, see ``ImageEmbedding.padding``.

    Attributes:
        keep_ratio: part of the tokens to keep, in (0, 1]; None when ``n_keep`` is given.
        n_keep: tokens to keep, at least 1; of an image that has fewer, all. Wins over ``keep_ratio``, which then
            becomes None.
        alpha: weight of the semantic score in [0, 1]; 1 - alpha is the weight of the sensitivity to quantization.
            "dynamic" derives it from the image (0.45..0.55).
        error: quantizer whose error is measured, see ``ERRORS``. "model" weighs the channels by the mmproj file's
            weights, which ``annotate(..., imatrix=...)`` writes; :func:`~qap_gguf.score` takes an array.
        group_size: channels that share one scale, at least 1; a last, shorter group is its own group. ggml types
            have block sizes of their own and ignore it.
        outlier: outlier magnitude, see ``OUTLIERS``.
        outlier_weight: weight of the outlier magnitude in the sensitivity, in [0, 1].
        semantic: source of the semantic score, see ``SEMANTICS``. "auto" takes the best one that the model has.
        select: how K tokens are chosen, see ``SELECTORS``.
        positions: positions of the kept tokens, see ``POSITIONS``. "compact" numbers them without gaps, "keep" leaves
            each its own (models with M-RoPE and relabelled ones, docs/method.md), "auto" is "keep" where that can be.
        merge: what becomes of dropped tokens, see ``MERGES``. "average" folds each into its most similar kept one;
            this is ours, beyond the paper.
        seed: seed of ``select="random"``, 0..2**64-1. Other selectors ignore it.
        encoder_keep: part of the tokens whose patches all layers of the image encoder see, in (0, 1]; the others are
            dropped early and cannot be kept at the end (docs/method.md, section 9). 1 drops none.
        encoder_layer: layers of the image encoder that see all patches, at least 1; None is a quarter of them.
        skip_flat_tiles: of a picture that is cut into tiles, those are not encoded, and keep no token, whose pixels
            differ from one colour by at most this, in levels of 0..255; never the overview. None encodes all.
        duplicates: tokens whose pixels differ from those of an earlier one by at most this, in levels of 0..255, are
            left out of the encoder and cannot be kept (docs/method.md, section 10). None leaves none out.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.

    Example:
        >>> PruneConfig(keep_ratio=0.125).count(144)
        18
        >>> PruneConfig(n_keep=64, alpha="dynamic").count(576)
        64
    """

    keep_ratio: float | None = _NATIVE["keep_ratio"]
    n_keep: int | None = None
    alpha: float | Literal["dynamic"] = shortest(_NATIVE["alpha"])
    error: str = _NATIVE["error"]
    group_size: int = _NATIVE["group_size"]
    outlier: str = _NATIVE["outlier"]
    outlier_weight: float = shortest(_NATIVE["outlier_weight"])
    semantic: str = _NATIVE["semantic"]
    select: str = _NATIVE["select"]
    positions: str = _NATIVE["positions"]
    merge: str = _NATIVE["merge"]
    seed: int = _NATIVE["seed"]
    encoder_keep: float = _NATIVE["encoder_keep"]
    encoder_layer: int | None = _NATIVE["encoder_layer"] or None
    skip_flat_tiles: int | None = None if _NATIVE["skip_flat_tiles"] < 0 else _NATIVE["skip_flat_tiles"]
    duplicates: int | None = None if _NATIVE["duplicates"] < 0 else _NATIVE["duplicates"]

    def __post_init__(self) -> None:
        if self.keep_ratio is None and self.n_keep is None:
            raise ConfigError("keep_ratio or n_keep must be given, got None for both; pass one of them")
        if self.keep_ratio is not None:
            self._set("keep_ratio", _as_float("keep_ratio", self.keep_ratio, "a number in (0, 1]", low_open=True))
        if self.n_keep is not None:
            self._set("n_keep", _as_int("n_keep", self.n_keep, 1, _MAX_I32))
            # One of the two only: equal configs then compare equal, and nothing shows a ratio that is not used.
            self._set("keep_ratio", None)
        if not (isinstance(self.alpha, str) and self.alpha == "dynamic"):
            self._set("alpha", _as_float("alpha", self.alpha, 'a number in [0, 1] or "dynamic"'))
        self._set("outlier_weight", _as_float("outlier_weight", self.outlier_weight, "a number in [0, 1]"))
        self._set("group_size", _as_int("group_size", self.group_size, 1, _MAX_I32))
        self._set("seed", _as_int("seed", self.seed, 0, _MAX_U64))
        self._set("encoder_keep", _as_float("encoder_keep", self.encoder_keep, "a number in (0, 1]", low_open=True))
        if self.encoder_layer is not None:
            self._set("encoder_layer", _as_int("encoder_layer", self.encoder_layer, 1, _MAX_I32))
        for name in LEVELS:
            if getattr(self, name) is not None:
                self._set(name, _as_int(name, getattr(self, name), 0, 255))
        if self.duplicates is not None and self.encoder_keep < 1:
            raise ConfigError(
                f"duplicates: expected encoder_keep 1 beside it, got {self.encoder_keep}; use one of the two"
            )
        for name, allowed in _CHOICES.items():
            self._set(name, _as_choice(name, getattr(self, name), allowed))

    def __repr__(self) -> str:
        """The budget, and what is not at its default; it can be evaluated again."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if (self.n_keep is None if field.name == "keep_ratio" else getattr(self, field.name) != field.default)
        ]
        return f"PruneConfig({', '.join(shown)})"

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    @property
    def drops_early(self) -> bool:
        """Whether the encoder leaves tokens out, so that an encode depends on this config: `encoder_keep` below 1,
        `skip_flat_tiles` or `duplicates`.

        Example:
            >>> PruneConfig(n_keep=18).drops_early, PruneConfig(duplicates=0).drops_early
            (False, True)
        """
        return self.encoder_keep < 1 or any(getattr(self, name) is not None for name in LEVELS)

    def count(self, n_tokens: int) -> int:
        """Return K, how many of `n_tokens` image tokens are kept: ``n_keep`` or ceil(keep_ratio * n_tokens), and no
        more than there are or an early drop leaves. Flat tiles and duplicates, which depend on the pixels, can make it
        fewer (``ImageEmbedding.n_left``).

        Args:
            n_tokens: tokens of the image before pruning, at least 1; padding is none (``ImageEmbedding.n_real``).

        Returns:
            K in 1..n_tokens.

        Raises:
            ConfigError: `n_tokens` is no positive integer.

        Example:
            >>> PruneConfig(keep_ratio=0.1).count(10), PruneConfig(n_keep=64).count(24)
            (1, 24)
            >>> PruneConfig(n_keep=64, encoder_keep=0.25).count(144)
            36
        """
        return self.to_params().count(_as_int("n_tokens", n_tokens, 1, _MAX_I32))

    def count_early(self, n_tokens: int) -> int:
        """Return how many of `n_tokens` tokens an early drop leaves: ceil(encoder_keep * n_tokens), all without one.

        Args:
            n_tokens: tokens of the image, or of one of the tiles that it is cut into, at least 1; padding is none.

        Raises:
            ConfigError: `n_tokens` is no positive integer.

        Example:
            >>> PruneConfig(encoder_keep=0.5).count_early(9), PruneConfig().count_early(9)
            (5, 9)
        """
        return self.to_params().count_early(_as_int("n_tokens", n_tokens, 1, _MAX_I32))

    def to_params(self) -> _core.Params:
        """The native form."""
        dynamic = isinstance(self.alpha, str)
        return _core.Params(
            keep_ratio=_NATIVE["keep_ratio"] if self.keep_ratio is None else self.keep_ratio,
            n_keep=self.n_keep or 0,
            alpha=_NATIVE["alpha"] if isinstance(self.alpha, str) else self.alpha,
            alpha_dynamic=dynamic,
            error=self.error,
            group_size=self.group_size,
            outlier=self.outlier,
            outlier_weight=self.outlier_weight,
            semantic=self.semantic,
            select=self.select,
            positions=self.positions,
            merge=self.merge,
            seed=self.seed,
            encoder_layer=self.encoder_layer or 0,
            encoder_keep=self.encoder_keep,
            skip_flat_tiles=-1 if self.skip_flat_tiles is None else self.skip_flat_tiles,
            duplicates=-1 if self.duplicates is None else self.duplicates,
        )

    def replace(self, /, **changes: Any) -> PruneConfig:
        """Return a copy with some fields changed; a new ``keep_ratio`` takes the place of an old ``n_keep``.

        Raises:
            ConfigError: an unknown field or a bad value.

        Example:
            >>> PruneConfig(n_keep=18).replace(keep_ratio=0.5).count(144)
            72
        """
        _refuse_unknown(changes)
        merged = self.to_dict()
        if changes.get("keep_ratio") is not None and "n_keep" not in changes:
            merged["n_keep"] = None
        return PruneConfig(**(merged | changes))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values, ready for JSON.

        Example:
            >>> PruneConfig(n_keep=18).to_dict()["n_keep"]
            18
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneConfig:
        """Make a config from a mapping of field names; fields that are not named keep their defaults.

        Raises:
            ConfigError: an unknown field or a bad value.

        Example:
            >>> PruneConfig.from_dict({"n_keep": 18}) == PruneConfig(n_keep=18)
            True
        """
        _refuse_unknown(values)
        return cls(**values)

    def to_metadata(self) -> dict[str, bool | int | float | str]:
        """Return the GGUF keys that make this config the default of an mmproj file.

        The types to write are in ``METADATA_TYPES``. ``seed`` is not stored. ``qap.alpha`` is left out when alpha is
        dynamic, and the keys of what the encoder leaves out where it is nothing: earlier versions can read the file
        then.

        Example:
            >>> PruneConfig().to_metadata()["qap.keep_ratio"]
            0.25
        """
        meta: dict[str, bool | int | float | str] = {"qap.version": METADATA_VERSION}
        if self.n_keep is not None:
            meta["qap.n_keep"] = self.n_keep
        elif self.keep_ratio is not None:
            meta["qap.keep_ratio"] = self.keep_ratio
        meta["qap.alpha_dynamic"] = isinstance(self.alpha, str)
        if not isinstance(self.alpha, str):
            meta["qap.alpha"] = self.alpha
        for name in ("error", "group_size", "outlier", "outlier_weight", "semantic", "select", "positions", "merge"):
            meta[f"qap.{name}"] = getattr(self, name)
        if self.encoder_keep < 1:
            meta["qap.encoder_keep"] = self.encoder_keep
        if self.encoder_layer is not None:
            meta["qap.encoder_layer"] = self.encoder_layer
        return meta | {f"qap.{name}": getattr(self, name) for name in LEVELS if getattr(self, name) is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> PruneConfig | None:
        """Read the config that an mmproj file carries, or None where it has no ``qap.*`` key.

        Args:
            metadata: the file's keys and values; keys outside ``qap.`` are passed over.

        Raises:
            ConfigError: another version of the keys, an unknown ``qap.*`` key, or a bad value.

        Example:
            >>> cfg = PruneConfig(n_keep=18, alpha="dynamic")
            >>> PruneConfig.from_metadata(cfg.to_metadata()) == cfg
            True
        """
        found = {key: value for key, value in metadata.items() if key.startswith("qap.") and key != WEIGHTS_KEY}
        if not found:
            return None
        unknown = sorted(found.keys() - METADATA_TYPES.keys())
        if unknown:
            raise ConfigError(
                f"qap keys of version {METADATA_VERSION} are {', '.join(METADATA_TYPES)}, got {', '.join(unknown)}; "
                "the file is newer than this qap_gguf: update it or convert the model again"
            )
        version = found.pop("qap.version", None)
        if isinstance(version, bool) or version != METADATA_VERSION:
            raise ConfigError(
                f"qap.version must be {METADATA_VERSION}, got {version!r}; "
                "convert the model again with this version of qap_gguf"
            )
        values = {key.removeprefix("qap."): _from_f32(value) for key, value in found.items()}
        dynamic = values.pop("alpha_dynamic", False)
        if not isinstance(dynamic, bool):
            raise ConfigError(f"qap.alpha_dynamic must be a bool, got {dynamic!r}; convert the model again")
        if dynamic:
            values["alpha"] = "dynamic"
        return cls.from_dict(values)


_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "error": ERRORS,
    "outlier": OUTLIERS,
    "semantic": SEMANTICS,
    "select": SELECTORS,
    "positions": POSITIONS,
    "merge": MERGES,
}
_FIELDS: Final = tuple(field.name for field in dataclasses.fields(PruneConfig))


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    unknown = [" ".join(str(name)[:80].split()) for name in values if name not in _FIELDS]
    if unknown:
        raise ConfigError(
            f"a prune config has the fields {', '.join(_FIELDS)}, got {', '.join(sorted(unknown))}; check the spelling"
        )
