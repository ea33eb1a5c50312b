"""What goes wrong, as OpenAI's clients expect it: ``{"error": {"message", "type", "param", "code"}}`` and a status.

What the client can change is a 4xx with the reason; all else is a 500 whose details go to the log only. llama-server's
errors are put into the same form.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from qap_gguf.errors import ArrayError, ConfigError, ImageError, ModelFileError, QapError, UnsupportedError

if TYPE_CHECKING:  # `batch` has these errors too, and no server
    from starlette.requests import Request
    from starlette.responses import JSONResponse

log = logging.getLogger("qap_gguf.serve")

#: Ours that are about the request.
_REQUEST = (ConfigError, ImageError, UnsupportedError, ArrayError, ModelFileError)
#: What llama-server says where no token of the vocabulary fits a grammar (llama-grammar.cpp, native/programs).
_NO_TOKEN = ("Unexpected empty grammar stack", "no token fits the grammar")
_FAILED = "the server failed; its log says why"


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: the reason.
        code: OpenAI's word for it.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def body_of(status: int, message: str, code: str | None = None) -> dict[str, dict[str, str | None]]:
    """The body for a status: one line, however many a field's name had, and Unicode, whatever was in it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    text = " ".join(message.encode("utf-8", "replace").decode().split())[:2000]
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


def describe(err: Exception) -> tuple[int, dict[str, dict[str, str | None]]]:
    """Status and body for an exception."""
    status, message, code = 500, _FAILED, None
    if isinstance(err, RefusedError):
        status, message, code = err.status, str(err), err.code
    elif isinstance(err, _REQUEST):
        status, message = 400, str(err)
        code = "context_length_exceeded" if "n_ctx" in message else None
    elif isinstance(err, UnicodeEncodeError):
        status, message = 400, "expected Unicode text, got a lone surrogate; take it out"
    elif isinstance(err, QapError):
        message = str(err)
    if status >= 500 and not isinstance(err, RefusedError):
        log.error("request failed: %s", err, exc_info=err)
    return status, body_of(status, message, code)


def from_upstream(status: int, data: bytes) -> tuple[int, dict[str, dict[str, str | None]]]:
    """Status and body for an error of llama-server.

    Args:
        status: what it answered with.
        data: its body, ``{"error": {"code", "message", "type"}}``, or an event of a stream with that in it.

    Example:
        >>> from_upstream(400, b'{"error": {"code": 400, "message": "no", "type": "x"}}')[1]["error"]["message"]
        'no'
    """
    try:
        error = json.loads(data)["error"]
        message, kind, status = str(error["message"]), str(error.get("type")), int(error.get("code", status))
    except (ValueError, KeyError, TypeError):
        log.error("llama-server: status %d: %s", status, data[:500].decode("utf-8", "replace"))
        return 500, body_of(500, _FAILED)
    if any(words in message for words in _NO_TOKEN):
        return 400, body_of(400, "grammar: no token of the model's vocabulary fits what it asks for; change it")
    if kind == "exceed_context_size_error":
        told = f"prompt: {message} (n_ctx less one is the most); shorten it"
        return 400, body_of(400, told, "context_length_exceeded")
    if not 400 <= status < 500:
        log.error("llama-server: status %d: %s", status, message)
        return (status, body_of(status, message)) if status in (501, 503) else (500, body_of(500, _FAILED))
    return status, body_of(status, message)


async def respond(_request: Request, err: Exception) -> JSONResponse:
    """The response for an exception of a route."""
    return problem(err)


def problem(err: Exception) -> JSONResponse:
    """The response for an exception."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    if isinstance(err, HTTPException):
        err = RefusedError(err.status_code, str(err.detail))
    status, body = describe(err)
    return JSONResponse(body, status_code=status, headers={"Retry-After": "1"} if status == 503 else None)


def error_event(body: dict[str, Any]) -> bytes:
    """An event of a stream whose status was sent already."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"
