"""Requests: llama-cpp-python's own models (llama_cpp/server/types.py), with what they lack.

Messages stay plain objects here: our handler reads them, and says what is wrong with them. Fields that are not listed
are passed over, as there and by OpenAI; ``prune`` is ours. A field that is null counts as left out, but for ``prune``,
where null has a meaning of its own.
"""

from __future__ import annotations

from typing import Any

from llama_cpp.server import types
from pydantic import BaseModel, Field, field_validator, model_validator


class _Nullable(BaseModel):
    """A model whose fields may be null, as many clients send what they leave at its default."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name == "prune"}


class StreamOptions(_Nullable):
    """What a stream has besides its text."""

    include_usage: bool = Field(default=False, description="Count the tokens in a last chunk.")


class ChatRequest(_Nullable, types.CreateChatCompletionRequest):
    """A request for a chat completion."""

    messages: list[dict[str, Any]] = Field(description="OpenAI-style messages.")  # type: ignore[assignment]
    tools: list[dict[str, Any]] | None = None  # type: ignore[assignment]
    tool_choice: Any = None
    functions: list[dict[str, Any]] | None = None  # type: ignore[assignment]
    function_call: Any = None
    response_format: dict[str, Any] | None = None  # type: ignore[assignment]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of max_tokens.")
    temperature: float = Field(default=0.2, ge=0.0)
    repeat_penalty: float = Field(default=1.0, gt=0.0)
    n: int | None = Field(default=1, ge=1, le=1, description="One answer for a request.")
    stop: str | list[str] | None = Field(default=None)
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    prune: dict[str, Any] | None = Field(
        default=None,
        description="How to prune the images of this request: fields of a PruneConfig, over the server's; null keeps "
        "all tokens. Left out, the server's setting holds.",
    )

    @property
    def asks_to_prune(self) -> bool:
        """Whether the request says how to prune."""
        return "prune" in self.model_fields_set

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 16:
            raise ValueError(f"expected at most 16 stop texts, got {len(stop)}; leave some out")
        return stop

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionRequest(_Nullable, types.CreateCompletionRequest):
    """A request for a completion of plain text."""

    prompt: str | list[str]
    max_tokens: int | None = Field(default=16, ge=1)
    n: int | None = Field(default=1, ge=1, le=1)
    best_of: int | None = Field(default=1, ge=1, le=1)
    temperature: float = Field(default=0.8, ge=0.0)
    repeat_penalty: float = Field(default=1.0, gt=0.0)
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @property
    def text(self) -> str:
        """The prompt."""
        assert isinstance(self.prompt, str)  # the validator saw to it
        return self.prompt

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: str | list[str]) -> str:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if len(texts) != 1 or not texts[0]:
            raise ValueError(f"expected one prompt that is not empty, got {len(texts)}; send one request for each")
        return texts[0]
