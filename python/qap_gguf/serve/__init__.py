"""An OpenAI-compatible server: llama.cpp's llama-server with pruning, behind a guard of ours (docs/serve.md).

llama-server answers; it listens on the loopback only. The guard is what clients reach: it lets in what
docs/serve.md promises, fetches and decodes pictures, and passes answers on as they come. Needs the extra ``serve``
(starlette, uvicorn).
"""

from qap_gguf.serve.settings import ServeSettings

__all__ = ["ServeSettings"]
