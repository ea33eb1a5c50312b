"""llama-cpp-python as it is, with pruning: its own chat handler, and one line of ours.

``MTMDChatHandler`` takes the chat template of the model's file. ``Llava15ChatHandler`` and its like have prompts of
their own, which must be the model's.

python examples/plain_llama_cpp_python.py --image photo.jpg --mmproj mmproj-f16.gguf --model model-Q4_K_M.gguf
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import MTMDChatHandler

import qap_gguf as qap


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def no_log(_level: int, _text: bytes, _data: object) -> None:
    """For libmtmd, whose log llama-cpp-python's `verbose` does not reach."""


def main() -> int:
    """Ask once with all of the picture's tokens and once with K."""
    files = qap.packaged_model()
    parser = argparse.ArgumentParser(description="llama-cpp-python's own handler, with pruning.")
    parser.add_argument("--image", type=Path, default=files.sample)
    parser.add_argument("--mmproj", type=Path, default=files.mmproj)
    parser.add_argument("--model", type=Path, default=files.model)
    parser.add_argument("--question", default="What is in row 1, column 2?")
    parser.add_argument("--n-keep", type=int, default=72)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    from llama_cpp import mtmd_cpp  # not before qap_gguf, which puts its own library there

    for set_log in (mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
        set_log(no_log, None)
    handler = MTMDChatHandler(clip_model_path=str(args.mmproj), verbose=False)
    llm = llama_cpp.Llama(
        str(args.model),
        chat_handler=handler,
        n_ctx=2048,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        verbose=False,
    )
    url = "data:image/png;base64," + base64.b64encode(args.image.read_bytes()).decode()
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": args.question}]
    for cfg in (None, qap.PruneConfig(n_keep=args.n_keep)):
        qap.set_default(cfg)
        completion: Any = llm.create_chat_completion([{"role": "user", "content": parts}], temperature=0, max_tokens=24)
        words = " ".join(completion["choices"][0]["message"]["content"].split())
        # completion["usage"] counts positions: it does not fall where kept tokens stay at their places
        print(f"{'all' if cfg is None else cfg.n_keep} tokens of the picture: {words}")
    llm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
