"""What goes wrong, as OpenAI's clients expect it: ``{"error": {"message", "type", "param", "code"}}`` and a status.

What the client can change is a 4xx with the reason; all else is a 500 whose details go to the log only.
"""

from __future__ import annotations

import logging

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qap_gguf.errors import ArrayError, ConfigError, ImageError, ModelFileError, QapError, UnsupportedError

log = logging.getLogger("qap_gguf.serve")

#: Ours that are about the request.
_REQUEST = (ConfigError, ImageError, UnsupportedError, ArrayError, ModelFileError)


class RefusedError(Exception):
    """A request that is refused before anything is done with it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def describe(err: Exception) -> tuple[int, dict[str, dict[str, str | None]]]:
    """Status and body for an exception."""
    status, message, code = 500, "the server failed; its log says why", None
    if isinstance(err, RefusedError):
        status, message, code = err.status, str(err), err.code
    elif isinstance(err, RequestValidationError):
        first = err.errors()[0] if err.errors() else {"loc": (), "msg": "not valid"}
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        status, message = 400, f"{where or 'body'}: {first['msg']}"
    elif isinstance(err, _REQUEST):
        status, message = 400, str(err)
        code = "context_length_exceeded" if "n_ctx" in message else None
    elif isinstance(err, UnicodeEncodeError):
        status, message = 400, "expected Unicode text, got a lone surrogate; take it out"
    elif isinstance(err, HTTPException):
        status, message = err.status_code, str(err.detail)
    elif isinstance(err, QapError):
        message = str(err)
    if status >= 500 and not isinstance(err, RefusedError):
        log.error("request failed: %s", err, exc_info=err)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message[:2000], "type": kind, "param": None, "code": code}}


async def respond(_request: Request, err: Exception) -> JSONResponse:
    """The response for an exception of a route."""
    status, body = describe(err)
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(body, status_code=status, headers=headers)
