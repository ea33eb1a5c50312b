"""The page at /qap: a picture, a question, K, and both answers. The files beside this one, as they are.

The files hold no secret and need no key; what the page asks for with it are the routes of everybody. Where the maps
come from: llama-server tells the scores of an answer's tokens where a request says ``"prune": {"scores": true}``
(native/programs/qap-server.h), so that nothing is computed or loaded twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from qap_gguf.config import PruneConfig
from qap_gguf.files.packaged import packaged_model
from qap_gguf.serve.settings import ServeSettings

_FOLDER = Path(__file__).resolve().parent
#: Path -> (file, its type).
FILES: Final[Mapping[str, tuple[Path, str]]] = {
    "/qap": (_FOLDER / "index.html", "text/html"),
    "/qap/page.css": (_FOLDER / "page.css", "text/css"),
    **{
        f"/qap/{name}.js": (_FOLDER / f"{name}.js", "text/javascript")
        for name in ("page", "server", "picture", "figures")
    },
    "/qap/sample.png": (packaged_model().sample, "image/png"),
}
#: The page loads from this server alone; pictures also from what the user chose (blob:, data:).
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


async def _file(request: Request) -> Response:
    path, kind = FILES[request.url.path]
    return FileResponse(path, media_type=kind, headers=HEADERS)


def page_settings(settings: ServeSettings, config: PruneConfig) -> dict[str, Any]:
    """What the page must know of the server: its model, its own pruning, its limits.

    Example:
        >>> page_settings(ServeSettings(), PruneConfig(n_keep=18))["n_keep"]
        18
    """
    rules = settings.sources
    return {
        "model": settings.model_name,
        "n_keep": config.n_keep,
        "keep_ratio": config.keep_ratio,
        "select": config.select,
        "max_tokens": settings.max_tokens,
        "max_body_bytes": settings.max_body_bytes,
        "max_image_bytes": rules.max_bytes,
        "max_pixels": rules.max_pixels,
    }


def page_routes(settings: ServeSettings, config: PruneConfig) -> list[Route]:
    """The page's files, and `/qap/settings`, which needs the key."""

    async def told(_request: Request) -> Response:
        return JSONResponse(page_settings(settings, config), headers={"Cache-Control": "no-store"})

    return [*(Route(path, _file) for path in FILES), Route("/qap/settings", told)]
