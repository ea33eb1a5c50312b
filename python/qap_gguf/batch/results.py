"""What became of a row: :class:`BatchResult`, and its form in a file."""

from __future__ import annotations

import csv
import io
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from qap_gguf.batch.rows import Row
from qap_gguf.serve.problems import body_of, from_upstream

_NO_CODE: Final = "server_error"


@dataclass(frozen=True)
class BatchResult:
    """The answer to a row, or why there is none.

    Attributes:
        id: the row's.
        image: what the row called its picture; None for bytes and arrays.
        answer: the text; None where there is an error.
        finish_reason: "stop" where the model or a stop text ended the answer, "length" where max_tokens or the context
            did.
        prompt_tokens: tokens of the prompt, those of pictures after pruning among them.
        tokens: of the answer.
        image_tokens: tokens of the row's pictures before pruning.
        kept: and after it.
        encode_s: seconds of the image encoder; 0 where the picture was encoded for another row.
        prefill_s: seconds for the prompt, without the encoder.
        decode_s: seconds for the answer. Others are made at the same time, so these do not add up to wall-clock time.
        error: one line; None where there is an answer.
        response: the whole answer as OpenAI's chat completions have it, with `timings` and `prune`; None with an error.
        status: HTTP's: 200, 4xx where the row is to blame for its error, 5xx where it is not.

    Example:
        >>> BatchResult("a.png", "a.png", "a dog", "stop", 60, 3, 144, 36).to_dict()["kept"]
        36
    """

    id: str
    image: str | None = None
    answer: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    image_tokens: int = 0
    kept: int = 0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    error: str | None = None
    response: Mapping[str, Any] | None = field(default=None, repr=False)
    status: int = field(default=200, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values: with an error only id, image and error, else all but error and response."""
        if self.error is not None:
            return {"id": self.id, "image": self.image, "error": self.error}
        return {name: value for name, value in asdict(self).items() if name in COLUMNS and name != "error"}

    def to_openai(self) -> dict[str, Any]:
        """As OpenAI's batch API writes it: `response` has the answer, or the error of a request that was refused."""
        body = self.response
        if body is None and self.status < 500:
            body = body_of(self.status, self.error or "")
        request = f"req_{secrets.token_hex(12)}"
        reply = None if body is None else {"status_code": self.status, "request_id": request, "body": body}
        error = None if body is not None else {"code": _NO_CODE, "message": self.error}
        return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": self.id, "response": reply, "error": error}

    def to_line(self, is_openai: bool = False) -> bytes:
        """A line of JSON, of OpenAI's form if that is asked for."""
        values = self.to_openai() if is_openai else self.to_dict()
        return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

    def to_record(self) -> bytes:
        """A record of CSV with the columns of COLUMNS."""
        values = self.to_dict()
        return csv_record([values.get(name) for name in COLUMNS])


#: The columns of a table.
COLUMNS: Final = (
    "id", "image", "answer", "finish_reason", "prompt_tokens", "tokens", "image_tokens", "kept", "encode_s",
    "prefill_s", "decode_s", "error",
)  # fmt: skip


def csv_record(cells: list[Any]) -> bytes:
    """A record of CSV; None is an empty cell."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace")


def failed(row: Row, why: str, status: int = 400) -> BatchResult:
    """The result of a row without an answer; `status` is HTTP's, 500 and up where the row is not to blame."""
    text = " ".join(why.encode("utf-8", "replace").decode().split())[:2000]
    return BatchResult(row.id, row.name, error=text, status=status)


def answered(row: Row, status: int, data: bytes) -> BatchResult:
    """The result of what llama-server said."""
    if status != 200:
        status, body = from_upstream(status, data)
        return failed(row, str(body["error"]["message"]), status)
    body = json.loads(data)
    choice = body["choices"][0]
    timings, prune, usage = body.get("timings") or {}, body.get("prune") or {}, body.get("usage") or {}
    encode = float(prune.get("encode_ms", 0.0))
    images = prune.get("images") or ()
    return BatchResult(
        row.id,
        row.name,
        answer=(choice["message"].get("content") if "message" in choice else choice.get("text")) or "",
        finish_reason=choice.get("finish_reason"),
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        tokens=int(usage.get("completion_tokens", 0)),
        image_tokens=sum(int(image["n_tokens"]) for image in images),
        kept=sum(int(image["n_kept"]) for image in images),
        encode_s=round(encode / 1000, 4),
        prefill_s=round(max(0.0, float(timings.get("prompt_ms", 0.0)) - encode) / 1000, 4),
        decode_s=round(float(timings.get("predicted_ms", 0.0)) / 1000, 4),
        response=body,
    )
