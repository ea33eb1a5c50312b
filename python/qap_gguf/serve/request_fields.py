"""The fields of requests: which there are, what they may hold, and llama-server's names for them.

llama-server takes well over a hundred fields, some of which no stranger should set. So only what stands here is passed
on, checked; all else is passed over, as by OpenAI. A field that is null counts as left out, but for ``prune``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from qap_gguf.errors import ConfigError
from qap_gguf.serve.problems import RefusedError

MAX_STOPS: Final = 16
_MAX_STOP_CHARACTERS: Final = 4096
_MAX_SEED: Final = 2**31


def _fail(name: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{name}: expected {expected}, got {str(value)[:80]!r}; correct it or leave it out")


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str, Any], float]:
    words = f"a number {f'above {low:g} and up' if above else f'from {low:g}'} to {high:g}"

    def check(name: str, value: Any) -> float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not right or not low <= value <= high or (above and value == low):
            raise _fail(name, words, value)
        return float(value)

    return check


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not low <= value <= high:
            raise _fail(name, f"an integer from {low} to {high}", value)
        return int(value)

    return check


def _seed(name: str, value: Any) -> int:
    return _integer(-(2**63), 2**64 - 1)(name, value) % _MAX_SEED


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _fail(name, "true or false", value)
    return value


def _stops(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _fail(name, "a text or a list of texts", value)
    if len(texts) > MAX_STOPS:
        raise ConfigError(f"{name}: expected at most {MAX_STOPS} stop texts, got {len(texts)}; leave some out")
    if any(len(text) > _MAX_STOP_CHARACTERS for text in texts):
        raise ConfigError(f"{name}: expected at most {_MAX_STOP_CHARACTERS} characters in a stop text; shorten it")
    return [text for text in texts if text]


def _choice(*words: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in words:
            raise _fail(name, f"one of {', '.join(words)}", value)
        return str(value)

    return check


_COUNT = _integer(1, 2**31 - 1)
#: Field -> (llama-server's name, check).
SAMPLING: Final[Mapping[str, tuple[str, Callable[[str, Any], Any]]]] = {
    "temperature": ("temperature", _number(0, 1000)),
    "top_p": ("top_p", _number(0, 1)),
    "top_k": ("top_k", _integer(-1, 2**31 - 1)),
    "min_p": ("min_p", _number(0, 1)),
    "typical_p": ("typical_p", _number(0, 1)),
    "seed": ("seed", _seed),
    "presence_penalty": ("presence_penalty", _number(-100, 100)),
    "frequency_penalty": ("frequency_penalty", _number(-100, 100)),
    "repeat_penalty": ("repeat_penalty", _number(0, 100, above=True)),
    "mirostat_mode": ("mirostat", _integer(0, 2)),
    "mirostat_tau": ("mirostat_tau", _number(0, 1000)),
    "mirostat_eta": ("mirostat_eta", _number(0, 1000)),
    "max_tokens": ("max_tokens", _COUNT),
    "stop": ("stop", _stops),
    "stream": ("stream", _flag),
    "cache_prompt": ("cache_prompt", _flag),
    "timings_per_token": ("timings_per_token", _flag),
    "return_progress": ("return_progress", _flag),
}
#: Those of a chat besides.
CHAT: Final[Mapping[str, tuple[str, Callable[[str, Any], Any]]]] = {
    "parallel_tool_calls": ("parallel_tool_calls", _flag),
    "reasoning_effort": ("reasoning_effort", _choice("none", "minimal", "low", "medium", "high", "xhigh")),
    "reasoning_format": ("reasoning_format", _choice("none", "auto", "deepseek")),
}


def parse(data: bytes, content_type: str, most_values: int | None = None) -> dict[str, Any]:
    """The JSON object of a body, without its nulls.

    Args:
        data: the body, in UTF-8 or, found out by its first bytes, UTF-16 or UTF-32.
        content_type: the header of that name.
        most_values: how often a comma or an opening bracket may stand in it, in texts too; None does not count. Reading
            32 MiB of nothing else takes four seconds, in which nobody else is answered.

    Raises:
        RefusedError: not JSON by its name, or in fact, or too many values.

    Example:
        >>> parse(b'{"top_p": null, "prune": null, "n": 1}', "application/json")
        {'prune': None, 'n': 1}
    """
    kind = content_type.partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        got = repr(content_type[:80]) if content_type else "none"
        raise RefusedError(400, f"body: expected Content-Type: application/json, got {got}; send that header")

    if most_values is not None and (n := sum(map(data.count, (b",", b"[", b"{")))) > most_values:
        raise RefusedError(
            400,
            f"body: expected at most {most_values} commas and opening brackets, got {n}; send less",
        )

    def constant(word: str) -> float:
        return float(word)  # NaN and its like are told by the name of their field

    try:
        body = json.loads(data, parse_constant=constant)
    except RecursionError as err:
        raise RefusedError(400, "body: expected JSON, got too many levels of it; make it flatter") from err
    except ValueError as err:  # UnicodeDecodeError is one, and so is a number of thousands of digits
        raise RefusedError(400, f"body: expected JSON, got an error ({err}); check it") from err
    if not isinstance(body, dict):
        raise RefusedError(400, f"body: expected a JSON object, got {type(body).__name__}; send one")
    return {name: value for name, value in body.items() if value is not None or name == "prune"}


def common(body: Mapping[str, Any], known: Mapping[str, tuple[str, Callable[[str, Any], Any]]]) -> dict[str, Any]:
    """The fields of `body` that stand in `known`, checked, under llama-server's names.

    Raises:
        ConfigError: a value that cannot be.
    """
    for name in ("n", "best_of"):
        if body.get(name, 1) != 1:
            raise _fail(name, "1, one answer for a request", body[name])
    if body.get("min_tokens"):
        raise _fail("min_tokens", "none, this server has no such limit", body["min_tokens"])
    out = {new: check(name, body[name]) for name, (new, check) in known.items() if name in body}
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise _fail("stream_options", 'an object such as {"include_usage": true}', options)
    if options.get("include_usage") is not None:
        out["stream_options"] = {"include_usage": _flag("stream_options.include_usage", options["include_usage"])}
    return out


def logit_bias(body: Mapping[str, Any], n_vocab: int, tokens_of: Callable[[str], list[int]]) -> dict[str, Any]:
    """The field of that name: a number for each token id, or with ``logit_bias_type`` "tokens" for each text.

    Raises:
        ConfigError: no such tokens, or no numbers.
    """
    if "logit_bias" not in body:
        return {}
    given, kind = body["logit_bias"], body.get("logit_bias_type", "input_ids")
    if kind not in ("input_ids", "tokens"):
        raise _fail("logit_bias_type", "input_ids or tokens", kind)
    if not isinstance(given, dict):
        raise _fail("logit_bias", "an object of token ids and numbers", given)
    check, bias = _number(-1e6, 1e6), {}
    for word, value in given.items():
        if kind == "input_ids" and not (word.isascii() and word.isdecimal() and int(word[:12]) < n_vocab):
            raise _fail("logit_bias", f"token ids from 0 to {n_vocab - 1}", word)
        ids = [int(word[:12])] if kind == "input_ids" else tokens_of(word)
        bias.update({str(token): check("logit_bias", value) for token in ids})
    return {"logit_bias": bias}
