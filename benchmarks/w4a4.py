#!/usr/bin/env python3
"""The regime that QAPruner was made for, on the two demo models: 4-bit weights and 4-bit activations.

    python benchmarks/w4a4.py tiny-llava scenes/questions.jsonl --n-keep 36 --n-keep 18 --out results-w4a4
    python benchmarks/w4a4.py dino-vl large/questions.jsonl -m out/dino-vl-Q4_K_M.gguf --mmproj out/mmproj-f16.gguf

ggml multiplies 4-bit weights by 8-bit or float activations; the paper (arXiv 2604.02816, sections 3 and 4) quantizes
both in groups of 128. So its claim is tested where it was made: the language model runs in torch with every matrix
of its layers rounded to 4 bits (W4), and the input of each as well (A4), symmetric, scale = max / 7 for each group of
128 channels of a row or token. Embeddings, the output matrix, norms, attention products and the KV cache stay in
float32, the image encoder is that of the mmproj file. Image tokens are scored and selected by the package itself, and
stand at their own positions, as with `positions="keep"`. A token of these models has 256 channels: two groups, where
LLaVA-1.5-7B has 32.

Resumable and printed as `qap-gguf eval` does it. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qap_gguf as qap
from qap_gguf.eval import (
    METHODS,
    Budget,
    Evaluation,
    Journal,
    Outcome,
    Question,
    Setup,
    Variant,
    fingerprint,
    interactions,
    load_questions,
    markdown,
    summarise,
    variants,
)
from qap_gguf.eval.made_tokens import replacement
from qap_gguf.eval.methods import REPLACED
from qap_gguf.eval.output import write_results

GROUP, LEVELS, MAX_TOKENS = 128, 7, 12
IMAGE = "<image>"
#: Model type -> what llama.cpp writes right before and after an image; each is tokenized by itself.
AROUND = {"llava": ("", ""), "internvl": ("<img>", "</img>")}
#: Regime -> bits of weights and of activations; 0 leaves them float32.
REGIMES = {"W32A32": (0, 0), "W4A32": (4, 0), "W4A4": (4, 4)}


def round_groups(x: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """Round the last dimension to 4 bits, symmetric, one scale for each `group` values; the last group may be shorter.

    Example:
        >>> round_groups(torch.tensor([7.0, 3.4, -6.6])).tolist()
        [7.0, 3.0, -7.0]
    """
    n = x.shape[-1]
    padded = nn.functional.pad(x, (0, -n % group)).unflatten(-1, (-1, group))
    scale = padded.abs().amax(-1, keepdim=True) / LEVELS
    return (torch.round(padded / (scale + 1e-8)) * scale).flatten(-2)[..., :n]


class RoundedLinear(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """A matrix of 4-bit weights, whose input may be rounded too."""

    def __init__(self, linear: Any, activations: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(round_groups(linear.weight.detach()), requires_grad=False)
        self.bias, self.activations = linear.bias, activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., n_in) -> (..., n_out)."""
        return nn.functional.linear(round_groups(x) if self.activations else x, self.weight, self.bias)


def round_layers(layers: Any, activations: bool) -> int:
    """Replace every matrix below `layers`; return how many."""
    linears = [(module, name) for module in layers.modules() for name, child in module.named_children()
               if isinstance(child, nn.Linear)]  # fmt: skip
    for module, name in linears:
        setattr(module, name, RoundedLinear(getattr(module, name), activations))
    return len(linears)


@dataclass(frozen=True)
class Shown:
    """What the language model reads of a picture.

    Attributes:
        tokens: float32 (k, n_embd), in reading order.
        places: their places among all tokens of the picture, int32 (k,), ascending.
        n_all: tokens of the whole picture: the text after it goes on there.
    """

    tokens: np.ndarray[Any, Any]
    places: np.ndarray[Any, Any]
    n_all: int


class TorchModel:
    """The checkpoint's language model in one regime."""

    def __init__(self, checkpoint: Path, regime: str) -> None:
        import transformers

        hf: Any = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        if hf.config.model_type not in AROUND:
            raise SystemExit(f"w4a4: error: expected one of {', '.join(AROUND)}, got {hf.config.model_type}")
        self._around = AROUND[hf.config.model_type]
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.body, self.head = hf.model.language_model, hf.lm_head
        # transformers 5.24 renamed the argument and warns at each use of the old name
        self._cache = "cache" if "cache" in inspect.signature(self.body.forward).parameters else "past_key_values"
        self.embed, self.end_id = hf.get_input_embeddings(), int(self.tokenizer.eos_token_id)
        self._new_cache: Any = transformers.DynamicCache
        weights, activations = REGIMES[regime]
        if weights:
            round_layers(self.body.layers, bool(activations))

    def prompt(self, question: str) -> tuple[list[int], list[int]]:
        """Tokens before and after the image, by the checkpoint's chat template."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        (before, after), (opening, closing) = text.split(IMAGE), self._around
        return self._tokens(before) + self._tokens(opening), self._tokens(closing) + self._tokens(after)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def answer(self, question: str, images: Sequence[Shown]) -> list[str]:
        """Greedy answers to one question about images of the same number of tokens."""
        with torch.inference_mode():
            return self._answer(question, images)

    def _answer(self, question: str, images: Sequence[Shown]) -> list[str]:
        before, after = (torch.tensor(part) for part in self.prompt(question))
        ends = [len(before) + image.n_all for image in images]
        inputs = torch.stack(
            [torch.cat([self.embed(before), torch.from_numpy(i.tokens.copy()), self.embed(after)]) for i in images]
        )
        places = torch.stack([
            torch.cat([torch.arange(len(before)), len(before) + torch.from_numpy(image.places).long(),
                       torch.arange(end, end + len(after))])
            for image, end in zip(images, ends, strict=True)
        ])  # fmt: skip
        cache = {self._cache: self._new_cache(config=self.body.config), "use_cache": True}
        mask = torch.ones_like(places)  # without it transformers may take a gap of places for another text's beginning
        out = self.body(inputs_embeds=inputs, position_ids=places, attention_mask=mask, **cache)
        said: list[list[int]] = [[] for _ in images]
        ended = torch.zeros(len(images), dtype=torch.bool)
        for step in range(MAX_TOKENS):
            token = self.head(out.last_hidden_state[:, -1]).argmax(-1)
            ended |= token == self.end_id
            for i in torch.nonzero(~ended).flatten().tolist():
                said[i].append(int(token[i]))
            if bool(ended.all()) or step == MAX_TOKENS - 1:
                break
            mask, places = torch.cat([mask, mask[:, :1]], dim=1), places[:, -1:] + 1
            out = self.body(inputs_embeds=self.embed(token[:, None]), position_ids=places, attention_mask=mask, **cache)
        return [str(self.tokenizer.decode(tokens)) for tokens in said]


def rows_for(vlm: Any, image: Any, variant: Variant) -> list[Shown]:
    """The tokens that the language model reads in each repetition of a variant, made tokens where the eval has them."""
    out, n = [], image.n_tokens
    for config in variant.configs:
        if config is None:
            out.append(Shown(image.features, np.arange(n, dtype=np.int32), n))
        elif variant.method in REPLACED:
            tokens = replacement(variant.method, image, config.count(n))
            places = vlm.prune(image, config.replace(n_keep=len(tokens))).indices
            out.append(Shown(tokens, places, n))
        else:
            pruned = vlm.prune(image, config)
            out.append(Shown(pruned.features, pruned.indices, n))
    return out


def ask(model: TorchModel, question: Question, rows: dict[Variant, list[Shown]], setup: Setup) -> list[Outcome]:
    """All variants, those of the same number of tokens in one batch."""
    sizes: dict[int, list[tuple[Variant, int]]] = {}
    for variant, images in rows.items():
        for i, image in enumerate(images):
            sizes.setdefault(len(image.tokens), []).append((variant, i))
    said: dict[tuple[Variant, int], str] = {}
    for keys in sizes.values():
        said |= zip(keys, model.answer(question.text, [rows[variant][i] for variant, i in keys]), strict=True)
    return [
        Outcome(question, variant, tuple(said[variant, i] for i in range(len(images))), len(images[0].tokens),
                (0.0,) * len(images), setup)
        for variant, images in rows.items()
    ]  # fmt: skip


def run(
    place: tuple[Path, str], vlm: Any, questions: Sequence[Question], compared: Sequence[Variant], journal: Journal
) -> list[Outcome]:
    """Every question under every variant, by the checkpoint and in the regime of `place`."""
    checkpoint, regime = place
    setup, outcomes, model = Setup(regime), [], None
    image, path = None, None
    rows: dict[Variant, list[Shown]] = {}
    for number, question in enumerate(questions):
        known = [journal.get(setup, variant, number, question) for variant in compared]
        if None in known:
            model = TorchModel(checkpoint, regime) if model is None else model
            if question.image != path:
                image, path = vlm.encode(question.image), question.image
                rows = {variant: rows_for(vlm, image, variant) for variant in compared}
            asked = ask(model, question, rows, setup)
            for outcome in asked:
                journal.add(outcome, number)
            known = list(asked)
        outcomes += [outcome for outcome in known if outcome is not None]
        if number % 100 == 99:
            print(f"{regime}: {number + 1} of {len(questions)} questions", file=sys.stderr, flush=True)
    return outcomes


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="the folder of tiny-llava or dino-vl")
    parser.add_argument("data", type=Path, help="questions, as `qap-gguf eval` reads them")
    parser.add_argument("-m", "--model", type=Path, help="the converted language model (default: the packaged pair)")
    parser.add_argument("--mmproj", type=Path, help="its image encoder")
    parser.add_argument("--n-keep", type=int, action="append", help="image tokens to keep; repeatable (default: 18)")
    parser.add_argument("--methods", default=",".join(METHODS), help="as for `qap-gguf eval`")
    parser.add_argument("--regimes", default=",".join(REGIMES), help=f"of {', '.join(REGIMES)} (default: all)")
    parser.add_argument("--limit", type=int, help="ask the first N questions only")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and the journal")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions = load_questions(args.data, args.limit)
    compared = variants(args.methods.split(","), [Budget(n_keep=k) for k in args.n_keep or [18]])
    header = {
        "data": fingerprint(args.data), "checkpoint": fingerprint(args.checkpoint / "model.safetensors"),
        "group": GROUP, "max_tokens": MAX_TOKENS, "positions": "keep",
        "mmproj": fingerprint(args.mmproj or qap.packaged_model().mmproj),
    }  # fmt: skip
    outcomes: list[Outcome] = []
    with (
        Journal(args.out / "journal.jsonl", header) as journal,
        qap.VisionModel(args.mmproj, args.model, n_threads=args.threads) as vlm,
    ):
        for regime in args.regimes.split(","):
            outcomes += run((args.checkpoint, regime), vlm, questions, compared, journal)
    pictures = len({question.image for question in questions})
    result = Evaluation(summarise(outcomes), len(questions), pictures, interactions=interactions(outcomes))
    plain = {"data": args.data, "checkpoint": args.checkpoint, "group": GROUP, **result.to_dict()}
    missing = write_results(args.out, result, plain)
    if missing is not None:
        print(missing, file=sys.stderr)
    print(markdown(result.main_table()))
    print(f"\n{result.note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
