"""Ten questions about one picture: it is encoded once, and later answers begin sooner.

    python examples/ten_questions.py --image photo.jpg --mmproj mmproj-f16.gguf --model model-Q4_K_M.gguf --n-keep 64
    python examples/ten_questions.py --rounds 5 --json

Asks through ``qap.ChatHandler`` and, in the same process, through llama-cpp-python's own ``Llava15ChatHandler`` as it
is without qap_gguf: it encodes the picture and evaluates all its tokens for each question. (With our libmtmd it encodes
a picture once too, unless ``qap.set_image_cache(0)`` says otherwise, as here.) Prints one line for each question: the
time to the first word with ours and with the stock handler, and the answer; then the medians and the encoder's passes.
With --rounds, the ten questions are asked so often by each handler in turn, ours from nothing each time; times are
medians.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Llava15ChatHandler

import qap_gguf as qap

QUESTIONS = [f"What is in row {row}, column {column}?" for row in (1, 2, 3) for column in (1, 2, 3)]
QUESTIONS.append("How many objects are there?")


def ask(llm: llama_cpp.Llama, image: str, question: str) -> tuple[float, str]:
    """Seconds to the first word, and the answer."""
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": question},
    ]
    started, first, words = time.perf_counter(), None, ""
    chunks: Any = llm.create_chat_completion(
        [{"role": "user", "content": parts}], temperature=0, max_tokens=24, stream=True
    )
    for chunk in chunks:
        piece = chunk["choices"][0]["delta"].get("content")
        if piece and first is None:
            first = time.perf_counter() - started
        words += piece or ""
    return first or time.perf_counter() - started, words


def main() -> int:
    """Ask, and print the table."""
    files = qap.packaged_model()
    parser = argparse.ArgumentParser(description="Ten questions about one picture.")
    parser.add_argument("--image", type=Path, default=files.sample)
    parser.add_argument("--mmproj", type=Path, default=files.mmproj)
    parser.add_argument("--model", type=Path, default=files.model)
    parser.add_argument("--n-keep", type=int, default=36)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    args = parser.parse_args()

    image = "data:image/png;base64," + base64.b64encode(args.image.read_bytes()).decode()
    llm = llama_cpp.Llama(
        str(args.model), n_ctx=2048, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
    )
    stock_handler = Llava15ChatHandler(clip_model_path=str(args.mmproj), verbose=False)
    n_encodes = 0
    ours: list[list[float]] = [[] for _ in QUESTIONS]
    stock: list[list[float]] = [[] for _ in QUESTIONS]
    answers: list[str] = []
    with qap.ChatHandler(args.mmproj, qap.PruneConfig(n_keep=args.n_keep)) as handler:
        for _ in range(args.rounds):
            handler.vision_model(llm).forget()
            before, answers = handler.n_encodes, []
            llm.chat_handler = handler
            for question, times in zip(QUESTIONS, ours, strict=True):
                seconds, words = ask(llm, image, question)
                times.append(seconds)
                answers.append(words)
            n_encodes = handler.n_encodes - before  # in a round
            llm.chat_handler = stock_handler
            qap.set_image_cache(0)
            for question, times in zip(QUESTIONS, stock, strict=True):
                times.append(ask(llm, image, question)[0])
            qap.set_image_cache(None)
    llm.close()

    mine = [1000 * statistics.median(times) for times in ours]
    other = [1000 * statistics.median(times) for times in stock]
    figures = {
        "n_keep": args.n_keep,
        "rounds": args.rounds,
        "questions": len(QUESTIONS),
        "first_ms": round(mine[0], 1),
        "others_median_ms": round(statistics.median(mine[1:]), 1),
        "stock_median_ms": round(statistics.median(other), 1),
        "encoder_passes": n_encodes,
    }
    if args.json:
        print(json.dumps(figures))
        return 0
    print("question                        ours ms  stock ms  answer")
    for question, a, b, words in zip(QUESTIONS, mine, other, answers, strict=True):
        print(f"{question:30} {a:8.1f}  {b:8.1f}  {words}")
    print("first {first_ms} ms, median of the others {others_median_ms} ms, ".format(**figures), end="")
    print("stock handler's median {stock_median_ms} ms; encoder passes: {encoder_passes}".format(**figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
