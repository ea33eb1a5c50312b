"""A training run that can be stopped and gone on with: steps, rates, one line a minute, whole checkpoints only."""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from demo_lessons import Lessons, Tally, rate_at
from emoji_scenes import SceneError
from folders import replacing_folder
from qap_gguf.files.atomic import replacing

STATE: Final = "train_state.pt"
_COPIED: Final = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip
_SAVE_EVERY: Final = 900  # seconds
_SAY_EVERY: Final = 60


class TrainError(Exception):
    """Training is not possible here; the message is one line with the cure."""


class Run:
    """One run: a transformers model, its lessons, and what it is asked.

    Args:
        model: transformers' model for conditional generation; what trains in it requires gradients.
        lessons: of it; their words and readers train too.
        init: the checkpoint that it came from.
        out: folder to save to.
        rate: highest learning rate of AdamW.
        bf16: multiply matrices in bfloat16 as it learns.
    """

    def __init__(self, model: Any, lessons: Lessons, init: Path, out: Path, rate: float, bf16: bool = False) -> None:
        self.model, self.lessons, self.init, self.out, self.rate, self.bf16 = model, lessons, init, out, rate, bf16
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.trained = [*trained, lessons.words.rows, *lessons.readers.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.step, self.right, self.tally = 0, dict[str, float](), Tally()
        if (out / STATE).is_file():
            state = torch.load(out / STATE)
            model.load_state_dict(state["weights"])
            lessons.readers.load_state_dict(state["readers"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.right = int(state["step"]), dict(state["right"])
            with torch.no_grad():
                lessons.words.rows.copy_(lessons.words.table[lessons.words.used])
            print(f"going on at step {self.step}", file=sys.stderr)

    def save(self) -> None:
        """Write checkpoint and state beside `out`, then put them in its place."""
        self.lessons.words.put_back()
        with replacing_folder(self.out) as made:
            weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
            state = {"step": self.step, "right": self.right, "weights": weights}
            state |= {"readers": self.lessons.readers.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, made / STATE)
            self.model.to(torch.float16).save_pretrained(made, save_original_format=False)
            self.model.to(torch.float32).load_state_dict(weights)
            for name in _COPIED:
                shutil.copyfile(self.init / name, made / name)

    def export(self, file: Path, taken: Sequence[str]) -> None:
        """Write weights but those with `taken` in their names, and the embeddings in use, as float16."""
        from safetensors.torch import save_file

        words = self.lessons.words
        words.put_back()
        skip = (*taken, "embed_tokens", "lm_head")
        state = self.model.state_dict()
        trained = {name: x.half().contiguous() for name, x in state.items() if not any(part in name for part in skip)}
        trained |= {"words": words.used.to(torch.int32), "rows": words.table[words.used].half()}
        with replacing(file) as part:
            save_file(trained, part)

    def _learn(self, loss: Any, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.step += 1
        for kind, answers in self.tally.right.items():
            share = sum(answers) / len(answers)
            self.right[kind] = self.right.get(kind, 0.5) + 0.05 * (share - self.right.get(kind, 0.5))

    def go(self, lesson: Callable[[], Any], held_out: Callable[[], str], steps: int, minutes: float) -> None:
        """Train until the steps or the minutes are over, or somebody interrupts; then save and judge.

        Args:
            lesson: draws scenes and returns a step's loss.
            held_out: one line about questions that training never asks.
            steps: in all, earlier runs included.
            minutes: of this run.
        """
        stopped: list[int] = []
        before = {
            number: signal.signal(number, lambda n, _: stopped.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
        }
        started = said = saved = time.monotonic()
        first = self.step
        try:
            while not stopped and self.step < steps and time.monotonic() - started < 60 * minutes:
                by_steps = (self.step - first) / max(1, steps - first)
                by_time = 0.0 if math.isinf(minutes) else (time.monotonic() - started) / (60 * minutes)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    loss = lesson()
                self._learn(loss, rate_at(max(by_steps, by_time), self.step - first, self.rate))
                now = time.monotonic()
                if now - said > _SAY_EVERY:
                    print(f"step {self.step}: {self.tally.line()}", file=sys.stderr, flush=True)
                    said = now
                if now - saved > _SAVE_EVERY:
                    self.save()
                    saved = now
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self.save()
        print(f"step {self.step}: held out, {held_out()}")


def arguments(about: str, rate: float, batch: int) -> argparse.ArgumentParser:
    """The options that all trainers have."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--init", type=Path, required=True, help="checkpoint to begin with")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new one, or of a run to go on with")
    parser.add_argument("--steps", type=int, default=20000, help="in all, earlier runs included (default: 20000)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then, and save (default: no limit)")
    parser.add_argument("--batch", type=int, default=batch, help=f"pictures of a step (default: {batch})")
    parser.add_argument("--questions", type=int, default=24, help="about each of them (default: 24)")
    parser.add_argument("--rate", type=float, default=rate, help=f"highest learning rate (default: {rate:g})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and training (default: 0)")
    parser.add_argument("--export", type=Path, help="file for the part that the tool which builds the checkpoint reads")
    parser.add_argument(
        "--bf16", action="store_true", help="multiply in bfloat16: faster where the CPU has instructions for it"
    )
    parser.add_argument("--font", type=Path, help="Noto Color Emoji, where it is not found by itself")
    return parser


def check_folders(init: Path, out: Path) -> None:
    """Raise TrainError unless `init` is a checkpoint and `out` is free or a run of such a tool."""
    if not (init / "model.safetensors").is_file():
        raise TrainError(f"expected a checkpoint folder with model.safetensors, got {init}; check --init")
    if out.exists() and not (out / STATE).is_file():
        raise TrainError(f"expected {out} to be free or a run of this tool; choose another --out")


def main(tool: str, train: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `train`; return the tool's exit status: 0 done, 1 not possible here."""
    try:
        check_folders(args.init, args.out)
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.threads)
        train(args)
    except (TrainError, SceneError, OSError) as err:
        print(f"{tool}: error: {err}", file=sys.stderr)
        return 1
    return 0
