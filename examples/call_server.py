"""Ask a running `qap-gguf serve` with the openai package, in turn with few and with all image tokens.

qap-gguf serve --port 8000 &
python examples/call_server.py --port 8000 --image photo.jpg --question "What is this?"
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path
from typing import Any

import openai

import qap_gguf as qap


def main() -> int:
    """Stream the answers to stdout, one line each."""
    parser = argparse.ArgumentParser(description="Ask a running qap-gguf serve.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--image", type=Path, default=qap.packaged_model().sample)
    parser.add_argument("--question", default="What is in row 1, column 2?")
    parser.add_argument("--n-keep", type=int, nargs="+", default=[36, 72])
    args = parser.parse_args()

    client = openai.OpenAI(base_url=f"http://{args.host}:{args.port}/v1", api_key=args.api_key)
    url = "data:image/png;base64," + base64.b64encode(args.image.read_bytes()).decode()
    prunes: list[dict[str, Any] | None] = [*({"n_keep": k} for k in args.n_keep), None]  # None: all tokens
    for prune in prunes:
        chunks = client.chat.completions.create(
            model="any",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": args.question},
                    ],
                }
            ],
            temperature=0,
            max_tokens=24,
            stream=True,
            extra_body={"prune": prune},
        )
        print(f"{prune}: ", end="")
        for chunk in chunks:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
