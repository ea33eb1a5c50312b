"""What a server allows and answers for."""

from __future__ import annotations

from dataclasses import dataclass, field

from qap_gguf.arguments import check_integer
from qap_gguf.errors import ConfigError
from qap_gguf.vision.sources import WEB_FORMATS, SourceRules


def web_rules() -> SourceRules:
    """Rules for images of strangers: no files, no URLs, formats of the web, small limits."""
    return SourceRules(
        allow_files=False, max_bytes=16 * 2**20, max_pixels=25_000_000, max_images=8, formats=WEB_FORMATS
    )


@dataclass(frozen=True)
class ServeSettings:
    """Settings of :func:`~qap_gguf.serve.create_app`.

    Attributes:
        model_name: the name under which the model is listed; requests may name any.
        api_key: what clients must send as bearer token; None lets everyone in.
        sources: where images may come from, and how large they may be.
        max_body_bytes: largest request body.
        max_tokens: longest answer that a request may ask for; None is what fits the context.
        max_requests: most requests that are worked on or wait at a time; more are told to come back later.
        cors: origins whose pages may call from a browser; none by default.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
    """

    model_name: str = "qap"
    api_key: str | None = None
    sources: SourceRules = field(default_factory=web_rules)
    max_body_bytes: int = 32 * 2**20
    max_tokens: int | None = None
    max_requests: int = 32
    cors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_integer("max_body_bytes", self.max_body_bytes, 1, 2**40)
        check_integer("max_requests", self.max_requests, 1)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1)
        if not self.model_name or self.api_key == "":
            raise ConfigError("model_name and api_key: expected text that is not empty; leave api_key out for none")
