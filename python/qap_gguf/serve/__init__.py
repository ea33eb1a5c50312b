"""An OpenAI-compatible server: llama-cpp-python's request types and completions, our chat handler (docs/serve.md).

Needs the extra ``serve`` (fastapi, uvicorn).
"""

from qap_gguf.serve.app import create_app
from qap_gguf.serve.settings import ServeSettings

__all__ = ["ServeSettings", "create_app"]
