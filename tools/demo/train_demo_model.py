#!/usr/bin/env python3
"""Train the packaged model further, on scenes that are drawn as it learns.

    python tools/demo/train_demo_model.py --init tiny-llava --out better --steps 20000        # resumes where it stopped
    python tools/demo/train_demo_model.py --init tiny-llava --out better --minutes 9 --device cuda

Everything is trained: tower, projector and language model. In one step of four the model sees all tokens of a picture,
in the others a random part of them, so that answers do not hang on a token's number; at least one patch of each object
stays. Kinds of scenes beside plain ones teach the questions of emoji_scenes_hard.py. The held-out scenes of
make_scenes.py have another seed. `out` is a checkpoint for `qap-gguf convert`; it is replaced whole, with the state of
the optimizer beside it. Needs torch, transformers and the emoji font.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from demo_batches import BEFORE, IGNORED, N_PATCHES, Tokenize, collate, make_example
from emoji_scenes import HELD_OUT_SEED, SceneError, find_font, font_sprites
from emoji_scenes_hard import SCENE_KINDS

STATE: Final = "train_state.pt"
_WARM_UP: Final = 200
_COPIED: Final = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip


class TrainError(Exception):
    """Training is not possible here; the message is one line with the cure."""


def tokenizer_of(checkpoint: Path) -> Tokenize:
    """text -> tokens by the checkpoint's tokenizer; texts repeat, so they are remembered."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint)

    @cache
    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    return lambda text: list(tokens(text))


class Batches(torch.utils.data.IterableDataset):  # type: ignore[misc]  # torch is Any to mypy
    """Endless batches; each worker has a stream of its own."""

    def __init__(self, checkpoint: Path, font: Path, kinds: list[str], batch: int, seed: int) -> None:
        self.checkpoint, self.font, self.kinds, self.batch, self.seed = checkpoint, font, kinds, batch, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number = 0 if worker is None else worker.id
        rng = random.Random(f"training {self.seed} {number}")
        tokenize, sprite = tokenizer_of(self.checkpoint), font_sprites(self.font)
        before = tokenize(BEFORE)
        while True:
            n_keep = N_PATCHES if rng.random() < 0.25 else round(math.exp(rng.uniform(math.log(9), math.log(120))))
            examples = [make_example(rng, sprite, tokenize, self.kinds, 6) for _ in range(self.batch)]
            arrays = collate(rng, examples, n_keep, len(before), before[0])
            yield {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


class Learner(nn.Module):  # type: ignore[misc]
    """The checkpoint as one function from a batch to its loss."""

    def __init__(self, checkpoint: Path, before: list[int]) -> None:
        super().__init__()
        import transformers

        self.llava: Any = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None], persistent=False)
        self.register_buffer("before", torch.tensor(before), persistent=False)

    def forward(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        """(mean loss of the answers' tokens, right answers among all answers, as a pair of counts)."""
        model = self.llava.model
        pixels = (batch["pixels"].permute(0, 3, 1, 2).float() / 255 - self.mean) / self.deviation
        layers = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = model.multi_modal_projector(layers[self.llava.config.vision_feature_layer][:, 1:])
        kept = features.gather(1, batch["patches"][..., None].expand(-1, -1, features.shape[-1]))
        embed = self.llava.get_input_embeddings()
        before = embed(self.before).expand(len(pixels), -1, -1)
        inputs = torch.cat([before, kept, embed(batch["tokens"])], dim=1)
        mask = torch.zeros(batch["sees"].shape, dtype=inputs.dtype, device=inputs.device)
        mask = mask.masked_fill(~batch["sees"], torch.finfo(inputs.dtype).min)[:, None]
        out = model.language_model(inputs_embeds=inputs, attention_mask=mask, position_ids=batch["positions"])
        after = out.last_hidden_state[:, before.shape[1] + kept.shape[1] :]
        wanted = batch["labels"] != IGNORED  # logits of the answers only: the vocabulary is most of the work
        logits, labels = self.llava.lm_head(after[wanted]).float(), batch["labels"][wanted]
        loss = nn.functional.cross_entropy(logits, labels)
        wrong = torch.zeros_like(batch["labels"])
        wrong[wanted] = (logits.argmax(-1) != labels).long()
        starts = wanted & ~torch.nn.functional.pad(wanted, (1, 0))[:, :-1]
        answers = torch.where(wanted, starts.long().cumsum(1), 0)  # number of the answer that a label belongs to
        missed = torch.zeros(len(answers), int(answers.max()) + 1, device=wrong.device, dtype=torch.long)
        missed.scatter_add_(1, answers, wrong)
        asked = starts.sum()
        return loss, (asked - (missed[:, 1:] > 0).sum(), asked)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Learning rate: a short warm-up, then half a cosine down to a hundredth.

    Example:
        >>> rate_at(0, 1000, 1.0) < rate_at(200, 1000, 1.0) > rate_at(999, 1000, 1.0)
        True
    """
    if step < _WARM_UP:
        return peak * (step + 1) / (_WARM_UP + 1)
    done = (step - _WARM_UP) / max(1, steps - _WARM_UP)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def save(learner: Learner, optimizer: Any, step: int, init: Path, out: Path) -> None:
    """Write checkpoint and state beside `out`, then put them in its place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        learner.llava.to(torch.float16).save_pretrained(made)
        learner.llava.to(torch.float32)
        for name in _COPIED:
            shutil.copy(init / name, made / name)
        weights = learner.llava.state_dict()
        torch.save({"step": step, "weights": weights, "optimizer": optimizer.state_dict()}, made / STATE)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.replace(out, old / out.name)
            os.replace(made, out)
            shutil.rmtree(old)
        else:
            os.replace(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def held_out(learner: Learner, args: argparse.Namespace, font: Path, device: str) -> dict[str, float]:
    """Right answers on held-out plain scenes, dense and with 18 random tokens, 600 questions each.

    An answer is right when every token of it, its end too, is the likeliest after the right ones before it: what
    greedy decoding would give.
    """
    tokenize, sprite = tokenizer_of(args.init), font_sprites(font)
    found = {}
    for name, n_keep in (("dense", N_PATCHES), ("K = 18", 18)):
        rng = random.Random(HELD_OUT_SEED)
        right = total = 0
        for _ in range(10):
            examples = [make_example(rng, sprite, tokenize, ["plain"], 6) for _ in range(10)]
            arrays = collate(rng, examples, n_keep, len(tokenize(BEFORE)), tokenize(BEFORE)[0])
            batch = {key: torch.from_numpy(np.ascontiguousarray(array)).to(device) for key, array in arrays.items()}
            _, (some, asked) = learner(batch)
            right, total = right + int(some), total + int(asked)
        found[name] = right / total
    return found


def train(args: argparse.Namespace) -> None:
    """Train until the steps or the minutes are over.

    Raises:
        TrainError: `out` is something else, or the checkpoint cannot be read.
    """
    started, device = time.monotonic(), args.device
    if not (args.init / "model.safetensors").is_file():
        raise TrainError(f"expected a checkpoint folder with model.safetensors, got {args.init}; check --init")
    if args.out.exists() and not (args.out / STATE).is_file():
        raise TrainError(f"expected {args.out} to be free or a run of this tool; choose another --out")
    torch.manual_seed(args.seed)
    font = find_font(args.font)
    learner = Learner(args.init, tokenizer_of(args.init)(BEFORE)).to(device).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    step = 0
    if args.out.exists():
        state = torch.load(args.out / STATE, map_location=device)
        learner.llava.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
        print(f"going on at step {step}", file=sys.stderr)
    # another stream after a resume: the scenes so far do not come again
    data = Batches(args.init, font, args.kinds, args.batch, args.seed + step)
    loader = iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=args.workers))
    right = asked = 0
    while step < args.steps and time.monotonic() - started < 60 * args.minutes:
        batch = {name: array.to(device, non_blocking=True) for name, array in next(loader).items()}
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, args.steps, args.rate)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device != "cpu"):
            loss, (some, all_) = learner(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        step += 1
        right, asked = right + int(some), asked + int(all_)
        if step % 100 == 0:
            share = 100 * right / asked
            print(f"step {step}: loss {float(loss):.3f}, right {share:.1f} %", file=sys.stderr, flush=True)
            right = asked = 0
    save(learner, optimizer, step, args.init, args.out)
    learner.eval()
    shares = held_out(learner, args, font, device)
    print(f"step {step}: held out, " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))


def _kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    if not set(kinds) <= set(SCENE_KINDS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(SCENE_KINDS)}, got {text!r}")
    return kinds


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0 done, 1 not possible here, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", type=Path, required=True, help="checkpoint to begin with")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new one, or of a run to go on with")
    parser.add_argument("--steps", type=int, default=20000, help="in all, earlier runs included (default: 20000)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then, and save (default: no limit)")
    parser.add_argument("--batch", type=int, default=64, help="pictures of a step (default: 64)")
    parser.add_argument("--rate", type=float, default=3e-4, help="highest learning rate (default: 3e-4)")
    parser.add_argument("--kinds", type=_kinds, default=list(SCENE_KINDS), help="kinds of scenes (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch's name of it")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes (default: 0, this one)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and training (default: 0)")
    parser.add_argument("--font", type=Path, help="Noto Color Emoji, where it is not found by itself")
    args = parser.parse_args(argv)
    try:
        train(args)
    except (TrainError, SceneError, OSError) as err:
        print(f"train_demo_model: error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
