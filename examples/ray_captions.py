"""Answers about the pictures of a folder by Ray Data, written as Parquet; a cluster works on it if there is one.

    python examples/ray_captions.py photos/ captions/ --prompt "Describe the picture." --actors 2 --cpus 4
    python examples/ray_captions.py s3://photos s3://captions --address auto --model m.gguf --mmproj mmproj.gguf

Each actor has a model of its own and takes --cpus CPUs; the model's files must lie at the same place on each node.
Pictures travel as the bytes of their files. A picture that cannot be read has a text in the column `error`. Without
files the packaged model answers; it knows pictures of emoji in a grid. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import ray
import ray.data

import qap_gguf as qap
from qap_gguf.batch.inputs import SUFFIXES
from qap_gguf.ray import VisionPredictor


def main() -> int:
    """Read, ask, write."""
    parser = argparse.ArgumentParser(description="Answers about the pictures of a folder, by Ray Data.")
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--prompt", default="How many objects are there?")
    parser.add_argument("--mmproj")
    parser.add_argument("--model")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of each actor")
    parser.add_argument("--parallel", type=int, default=4, help="answers side by side in each actor")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--address", help="of a cluster; none starts Ray on this machine")
    args = parser.parse_args()

    ray.init(address=args.address, log_to_driver=False, ignore_reinit_error=True)
    settings: dict[str, Any] = {
        "model": args.model,
        "mmproj": args.mmproj,
        "prompt": args.prompt,
        "prune": qap.PruneConfig(keep_ratio=args.keep_ratio),
        "n_ctx": args.ctx,
        "parallel": args.parallel,
        "image_column": "bytes",
    }
    endings = [suffix[1:] for suffix in SUFFIXES]
    pictures = ray.data.read_binary_files(
        args.folder, include_paths=True, file_extensions=endings, ray_remote_args={"num_cpus": 0.1}
    )
    answers = pictures.map_batches(
        VisionPredictor,
        fn_constructor_kwargs=settings,
        batch_size=args.batch_size,
        num_cpus=args.cpus,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
    )
    answers.write_parquet(args.out, ray_remote_args={"num_cpus": 0.1})
    print(f"rows with the columns path, answer, error and others are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
