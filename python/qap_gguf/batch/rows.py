"""Rows of a batch: what each of their keys means, and the request that a row becomes.

A row is a mapping. Ours has `image` (or several), `prompt` and settings; a row of OpenAI's batch files has `custom_id`
and `body`. A value that is None or NaN, or an empty text, counts as left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qap_gguf.arguments import is_unicode
from qap_gguf.config import LEVELS, PruneConfig
from qap_gguf.errors import ConfigError
from qap_gguf.serve.request_fields import CHAT, SAMPLING
from qap_gguf.vision.images import ImageSource
from qap_gguf.vision.sources import is_image

CHAT_PATH: Final = "/v1/chat/completions"
PATHS: Final = (CHAT_PATH, "/v1/completions")
#: Settings of the pruning; `error` is what a result is called, and `seed` is that of sampling. `prune` has them all.
_PRUNE: Final = tuple(f.name for f in dataclasses.fields(PruneConfig) if f.name not in ("error", "seed"))
_WHOLE: Final = ("n_keep", "group_size", "encoder_layer", *LEVELS)
_NOT_IN_ROWS: Final = ("stream", "timings_per_token", "return_progress")
#: Settings of the answer.
_ANSWER: Final = (
    *(name for name in (*SAMPLING, *CHAT) if name not in _NOT_IN_ROWS),
    "response_format", "grammar", "logit_bias", "logit_bias_type", "chat_template_kwargs",
)  # fmt: skip
_OBJECTS: Final = ("stop", "response_format", "logit_bias", "chat_template_kwargs", "prune")
_TEXTS: Final = ("id", "image", "prompt", "system", "grammar", "select", "positions", "merge", "semantic", "outlier")
#: All that a row may have.
KEYS: Final = ("id", "image", "prompt", "system", "dense", "prune", *_PRUNE, *_ANSWER)
_PLACE: Final = {"type": "image_url", "image_url": {"url": "data:,"}}


@dataclass(frozen=True)
class Defaults:
    """What holds for rows that do not say otherwise.

    Attributes:
        prompt: the question; None where each row has its own.
        system: the system message.
        answer: fields of a request, such as max_tokens.
        config: how pictures are pruned; a frame of a video keeps its share of that.
    """

    prompt: str | None = None
    system: str | None = None
    answer: Mapping[str, Any] = field(default_factory=dict)
    config: PruneConfig | None = None


@dataclass(frozen=True)
class Row:
    """A row, read.

    Attributes:
        id: no other row has it.
        name: of its picture, None where that has none.
        body: of its request; pictures of ours are not in it yet.
        images: what stands for its pictures; () where they are in the body.
        path: the route.
        error: why it cannot be asked; None where it can.
    """

    id: str
    name: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)
    images: tuple[ImageSource, ...] = field(default=(), repr=False)
    path: str = CHAT_PATH
    error: str | None = None


@dataclass(frozen=True)
class Given:
    """A row as a file has it.

    Attributes:
        values: by name; a mapping, or a picture alone.
        folder: relative paths of pictures are from here; None is the current one.
        error: why there are no values.
        is_openai: it stands in one of OpenAI's batch files.
        name: of the picture, where it is a frame.
        share: the tokens that a frame keeps, as a multiple of those that the settings say.
    """

    values: Any
    folder: Path | None = None
    error: str | None = None
    is_openai: bool = False
    name: str | None = None
    share: float = 1.0


def plain(value: Any) -> Any:
    """A value as Python has it; None for what counts as left out.

    Example:
        >>> import numpy as np
        >>> plain(np.int64(3)), plain(float("nan")), plain(""), plain(np.str_("a"))
        (3, None, None, 'a')
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy or of a column
        value = value.item()
    is_nan = (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in ("NAType", "NaTType")
    return None if is_nan or (isinstance(value, str) and not value) else value


def from_text(name: str, value: str) -> Any:
    """The value of a setting that came as text, in a table of texts.

    Example:
        >>> from_text("n_keep", "36"), from_text("stop", "["), from_text("select", "dpp"), from_text("dense", "true")
        (36, '[', 'dpp', True)
    """
    if name in _TEXTS or (name in _OBJECTS and value[:1] not in ("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def is_openai(row: Mapping[str, Any]) -> bool:
    """Whether a row has the form of OpenAI's batch files."""
    return "custom_id" in row and "body" in row


def read_row(given: Any, number: int, defaults: Defaults) -> Row:
    """A row as someone gave it; a row that cannot be asked says why, and raises nothing.

    Args:
        given: a mapping, a picture alone, or a :class:`Given`.
        number: from 1; the id of a row without one.
        defaults: what holds where the row says nothing.

    Example:
        >>> read_row({"image": "a.png", "n_keep": 36.0}, 7, Defaults("What?")).body["prune"]
        {'n_keep': 36}
        >>> read_row({"image": "a.png", "max_token": 5}, 7, Defaults("What?")).error.partition(";")[0]
        "row: expected known keys, got 'max_token'"
    """
    folder, frame, share = None, None, 1.0
    if isinstance(given, Given):
        if given.error is not None or (given.is_openai and not is_openai(given.values)):
            why = given.error or f"row {number}: expected custom_id and body, as in the first one; correct it"
            return Row(str(number), error=why)
        folder, frame, share, given = given.folder, given.name, given.share, given.values
    if not isinstance(given, Mapping):
        given = {"image": given, "id": os.fspath(given) if isinstance(given, (str, os.PathLike)) else None}
    if is_openai(given):
        return _openai_row(given, number)
    values = {name: value for name, found in given.items() if (value := plain(found)) is not None}
    name = frame or _name(values.get("image"))
    try:
        row_id = _id(values.get("id", number), number)
        row = Row(row_id, name)
        unknown = next((key for key in values if key not in KEYS), None)
        if unknown is not None:
            raise ConfigError(f"row: expected known keys, got {str(unknown)[:80]!r}; docs/batch.md lists them")
        image = values.get("image")
        images = _images(image if folder is None else beside(image, folder))
        values |= _share(defaults.config, share)
        return dataclasses.replace(row, body=_body(values, len(images), defaults), images=images)
    except ConfigError as err:
        return Row(str(values.get("id", number))[:1000], name, error=str(err))


def _share(config: PruneConfig | None, share: float) -> dict[str, Any]:
    """The settings of a frame that keeps `share` times what others do.

    Example:
        >>> _share(PruneConfig(keep_ratio=0.25), 1.5), _share(PruneConfig(n_keep=36), 0.5), _share(PruneConfig(), 1.0)
        ({'keep_ratio': 0.375}, {'n_keep': 18}, {})
    """
    if config is None or share == 1.0 or (config.n_keep is None and config.keep_ratio == 1.0):
        return {}
    if config.n_keep is not None:
        return {"n_keep": max(1, round(config.n_keep * share))}
    return {"keep_ratio": min(1.0, (config.keep_ratio or 1.0) * share)}


def _id(value: Any, number: int) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not is_unicode(str(value)):
        raise ConfigError(f"id: expected a text or a whole number in row {number}, got {str(value)[:80]!r}; correct it")
    return str(value)


def _name(image: Any) -> str | None:
    """What a picture is called in the output."""
    if isinstance(image, Mapping):
        image = image.get("path")
    if isinstance(image, str):
        return image[:40] + "..." if image[:5].lower() == "data:" else image
    return os.fspath(image) if isinstance(image, os.PathLike) else None


def _images(given: Any) -> tuple[ImageSource, ...]:
    if given is None:
        raise ConfigError("image: expected a picture, got none; give a path")
    found = []
    for image in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(image, Mapping):  # Hugging Face's datasets in Parquet: {"bytes": ..., "path": ...}
            image = image.get("bytes") or image.get("path")  # noqa: PLW2901
        if not (isinstance(image, str) and image) and not is_image(image):
            raise ConfigError(f"image: expected a path, bytes or an array, got {type(image).__name__}; give a path")
        found.append(image)
    return tuple(found)


def _body(values: Mapping[str, Any], n_images: int, defaults: Defaults) -> dict[str, Any]:
    prompt, system = values.get("prompt", defaults.prompt), values.get("system", defaults.system)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError("prompt: expected a question, got none; give the row a prompt, or all of them one with -p")
    parts: list[dict[str, Any]] = [_PLACE] * n_images
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": str(system)})
    body = {"messages": messages, **defaults.answer, **{key: values[key] for key in _ANSWER if key in values}}
    prune = {key: _whole(values[key]) if key in _WHOLE else values[key] for key in _PRUNE if key in values}
    if values.get("dense") not in (None, False):
        if prune or "prune" in values:
            raise ConfigError("dense: expected no settings of the pruning beside it; leave out one or the other")
        return body | {"prune": False}
    if "prune" in values:
        asked = values["prune"]
        if prune and not isinstance(asked, Mapping):
            raise ConfigError(f"prune: expected an object beside {next(iter(prune))}, got {asked!r}; leave one out")
        prune = {**asked, **prune} if isinstance(asked, Mapping) else asked
        return body | {"prune": prune}
    return body | ({"prune": prune} if prune else {})


def _whole(value: Any) -> Any:
    """Tables have a column of floats where some of its cells are empty."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _openai_row(given: Mapping[str, Any], number: int) -> Row:
    row_id, body, path = given["custom_id"], given["body"], given.get("url", CHAT_PATH)
    try:
        row = Row(_id(row_id, number), path=str(path))
    except ConfigError as err:
        return Row(str(number), error=str(err))
    if given.get("method", "POST") != "POST" or path not in PATHS:
        asked = f"{str(given.get('method', 'POST'))[:20]} {str(path)[:80]}"
        return dataclasses.replace(row, error=f"url: expected POST {' or '.join(PATHS)}, got {asked}; correct it")
    if not isinstance(body, Mapping):
        return dataclasses.replace(row, error=f"body: expected an object, got {str(body)[:80]!r}; correct it")
    kept = {name: value for name, value in body.items() if value is not None or name == "prune"}
    return dataclasses.replace(row, body={**kept, "stream": False})


def beside(image: Any, folder: Path) -> Any:
    """A picture that a file in `folder` names: a relative path is one from there.

    Example:
        >>> beside("a.png", Path("photos")) == Path("photos/a.png"), beside("data:,", Path("photos"))
        (True, 'data:,')
    """
    if isinstance(image, str) and image and image.partition(":")[0].lower() not in ("data", "http", "https", "file"):
        return folder / image
    if isinstance(image, Mapping) and not image.get("bytes"):
        return beside(image.get("path"), folder)
    if isinstance(image, Sequence) and not isinstance(image, (str, bytes)):
        return [beside(one, folder) for one in image]
    return image
