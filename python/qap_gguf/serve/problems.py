"""What goes wrong, as OpenAI's clients expect it: ``{"error": {"message", "type", "param", "code"}}`` and a status.

What the client can change is a 4xx with the reason; all else is a 500 whose details go to the log only.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from qap_gguf.errors import ArrayError, ConfigError, ImageError, ModelFileError, QapError, UnsupportedError

log = logging.getLogger("qap_gguf.serve")


class ProblemDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="The reason, in one line.")
    type: str = Field(description="invalid_request_error, or server_error.")
    param: str | None = None
    code: str | None = None


class Problem(BaseModel):
    """The body of every answer that is no answer."""

    error: ProblemDetail


#: For the OpenAPI document.
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "The request is refused: what was expected, what came, what to do."},
    "5XX": {"model": Problem, "description": "Too many requests wait (503), or the server failed (500)."},
}

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
    message = " ".join(message.split())  # a field's name may have been of two lines
    return status, {"error": {"message": message[:2000], "type": kind, "param": None, "code": code}}


def _wrong_type(request: Request, err: Exception) -> RefusedError | None:
    """A body that was not read as JSON because its type says that it is none."""
    if not isinstance(err, RequestValidationError) or not any(row["loc"] == ("body",) for row in err.errors()):
        return None
    sent = request.headers.get("content-type", "")
    kind = sent.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return None
    got = repr(sent[:80]) if sent else "none"
    return RefusedError(400, f"body: expected Content-Type: application/json, got {got}; send that header")


async def respond(request: Request, err: Exception) -> JSONResponse:
    """The response for an exception of a route."""
    err = _wrong_type(request, err) or err
    status, body = describe(err)
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(body, status_code=status, headers=headers)
