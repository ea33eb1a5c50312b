"""The same drop in torch, on transformers' own towers: dropped patches are hidden from the attention of later layers;
of all layers, where it is known before which ones they are.

Nothing is gathered or moved here, so places and positions cannot go wrong the same way twice: what a kept patch becomes
depends on the kept ones only, whether the others are gone or out of sight. Scores are the reference's, in NumPy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qap_gguf as qap

torch = pytest.importorskip("torch")

Array = npt.NDArray[Any]


@dataclass
class Tower:
    """Where the patches of a tower stand.

    Attributes:
        module: transformers' vision tower.
        grid: (rows, columns) of patches.
        merge: patches of a token, per side.
        cls: position of the class token, or None.
        consecutive: the patches of a token stand one after another (Qwen), not in lines of the picture.
        order: (n_tok,), which token of the picture each place of the tower holds (windows); None: lines of the picture.
    """

    module: Any
    grid: tuple[int, int]
    merge: int = 1
    cls: int | None = None
    consecutive: bool = False
    order: Array | None = None

    def tokens(self, values: Array) -> Array:
        """Values of all positions as those of the patches of each token, (n_tok, merge^2, ...)."""
        patches = values if self.cls is None else np.delete(values, self.cls, axis=0)
        rows, columns, m = *self.grid, self.merge
        if self.consecutive:
            places = patches.reshape(-1, m * m, *patches.shape[1:])
            return places if self.order is None else places[np.argsort(self.order)]
        lines = patches.reshape(rows // m, m, columns // m, m, *patches.shape[1:])
        return lines.swapaxes(1, 2).reshape(-1, m * m, *patches.shape[1:])


@dataclass
class Drop:
    """What was dropped, filled while the tower runs: scores (n_tok,) and the tokens that went on, (n_early,).

    After 0 layers `kept` is given.
    """

    after: int
    n_early: int
    total: Array = field(default_factory=lambda: np.empty(0))
    kept: Array = field(default_factory=lambda: np.empty(0, np.int32))
    hidden: Array = field(default_factory=lambda: np.empty(0))


def _layers(module: Any) -> Any:
    """The list of the tower's layers: the longest there is."""
    lists = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList)]
    return max((m for m in lists if hasattr(m[0], "mlp") or hasattr(m[0], "feed_forward")), key=len)


def _choose(tower: Tower, drop: Drop, weights: Array, config: qap.PruneConfig) -> Array:
    """Which positions stay in sight. weights: (queries, keys), mean over heads, of the layer that ran last."""
    of_class = tower.cls is not None and config.semantic != "attention"
    raw = weights[tower.cls] if of_class else weights.mean(0)
    relevance = np.log(np.maximum(tower.tokens(raw).mean(1), 1e-6 / len(raw)))
    x = tower.tokens(drop.hidden).reshape(len(relevance), -1)
    found = qap.reference.score(
        x,
        semantic=relevance,
        alpha=config.alpha,
        error=config.error,
        group_size=config.group_size,
        outlier=config.outlier,
    )
    drop.total = found.total
    drop.kept = np.sort(np.argsort(-drop.total, kind="stable")[: drop.n_early]).astype(np.int32)
    return _in_sight(tower, drop.kept, len(raw))


def _in_sight(tower: Tower, kept: Array, n_positions: int) -> Array:
    """Positions of the patches of these tokens, and of the class token."""
    numbers = tower.tokens(np.arange(n_positions))
    seen = numbers[kept].reshape(-1)
    return seen if tower.cls is None else np.append(seen, tower.cls)


@contextmanager
def dropping(tower: Tower, drop: Drop, config: qap.PruneConfig) -> Iterator[None]:
    """Within the block, a run of the tower drops; one picture at a time."""
    module, n_done, first = tower.module, 0, 0  # layers that ran; keys of this layer that were seen
    mask: Any = None
    weights: Any = None

    def attend(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(owner: Any, query: Any, key: Any, value: Any, attention_mask: Any, *rest: Any, **more: Any) -> Any:
            nonlocal mask, weights, first
            if mask is None and n_done == drop.after:
                n_positions = tower.grid[0] * tower.grid[1] + (tower.cls is not None)
                known = drop.after == 0
                seen = _in_sight(tower, drop.kept, n_positions) if known else _choose(tower, drop, weights, config)
                mask = torch.full((1, 1, 1, n_positions), -1e30)
                mask[..., torch.tensor(seen)] = 0
            if mask is not None:
                own_keys = mask[..., first : first + key.shape[2]]  # a layer with windows comes here for each of them
                attention_mask = own_keys if attention_mask is None else attention_mask + own_keys
            out = real(owner, query, key, value, attention_mask, *rest, **more)
            weights = out[1][0].mean(0).numpy()
            first += key.shape[2]
            return out

        return wrapped

    def count(_module: Any, _inputs: Any, _output: Any) -> None:
        nonlocal n_done, first
        n_done, first = n_done + 1, 0

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        drop.hidden = hidden.reshape(-1, hidden.shape[-1]).numpy()

    own = {type(m).__module__ for m in module.modules() if type(m).__module__.startswith("transformers.models")}
    names = ("vision_eager_attention_forward", "eager_attention_forward")
    undo = [(sys.modules[o], n, getattr(sys.modules[o], n)) for o in own for n in names if hasattr(sys.modules[o], n)]
    before = module.config._attn_implementation
    layers = _layers(module)
    hooks = [layer.register_forward_hook(count) for layer in layers]
    hooks.append(layers[max(0, drop.after - 1)].register_forward_hook(note))
    module.set_attn_implementation("eager")
    for place, name, real in undo:
        setattr(place, name, attend(real))
    try:
        yield
    finally:
        for place, name, real in undo:
            setattr(place, name, real)
        module.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
