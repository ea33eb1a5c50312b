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
    """What the guard lets in.

    Attributes:
        model_name: the name under which the model is listed; requests may name any.
        n_ctx: tokens of a slot's context.
        api_key: what clients must send as bearer token; None lets everyone in.
        sources: where images may come from, and how large they may be.
        max_body_bytes: largest request body.
        max_tokens: longest answer that a request may ask for; None is what fits the context.
        max_requests: most requests that are worked on or wait at a time; more are told to come back later.
        max_seconds: longest time of one request, waiting included.
        cors: origins whose pages may call from a browser; none by default.
        routes: paths of llama-server that are passed on as they are; "/x" stands for "/x/..." too.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.

    Example:
        >>> ServeSettings(max_requests=0)
        Traceback (most recent call last):
        qap_gguf.errors.ConfigError: max_requests: expected an integer from 1, got 0; choose one in that range
    """

    model_name: str = "qap"
    n_ctx: int = 2048
    api_key: str | None = None
    sources: SourceRules = field(default_factory=web_rules)
    max_body_bytes: int = 32 * 2**20
    max_tokens: int | None = None
    max_requests: int = 32
    max_seconds: int = 600
    cors: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_integer("max_body_bytes", self.max_body_bytes, 1, 2**40)
        for name in ("n_ctx", "max_requests", "max_seconds"):
            check_integer(name, getattr(self, name), 1)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1)
        if not self.model_name or self.api_key == "":
            raise ConfigError("model_name and api_key: expected text that is not empty; leave api_key out for none")
        for route in self.routes:
            if not route.startswith("/"):
                raise ConfigError(f"routes: expected a path such as /slots, got {route!r}; begin it with /")

    def passes(self, path: str) -> bool:
        """Whether llama-server's route `path` was asked for."""
        return any(path == route or path.startswith(route.rstrip("/") + "/") for route in self.routes)
