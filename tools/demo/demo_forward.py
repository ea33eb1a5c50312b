"""A training pass through a small model of Llama's or Qwen2's shape: a picture once, its questions as branches.

transformers' modules hold the weights; this file only orders the work. The image tokens are a prefix that sees itself
causally, each question sees the prefix and its own tokens before. The last layer computes only what is needed: keys
and values of the prefix, and the last columns of the questions. tests/parity/test_train_demo.py compares it with
transformers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

#: Layers whose first head is shown where to look (demo_lessons.py).
SEARCH_LAYER, CARRY_LAYER = 1, 2


class Seen(NamedTuple):
    """What the lessons read inside the model; b scenes, q questions of n tokens, p tokens of the prefix.

    Attributes:
        logits: layer -> attention logits of its first head, (b, q, n, p + n): prefix first, own tokens after.
        into: the prefix as layer ``SEARCH_LAYER`` reads it, after its norm, (b, p, d).
        head: what the first head of that layer found for each token of the questions, (b, q, n, d of a head).
        after: the questions' tokens after that layer, (b, q, n, d).
    """

    logits: dict[int, Any]
    into: Any
    head: Any
    after: Any


def _angles(position: Any, size: int, theta: float) -> tuple[Any, Any]:
    frequency = theta ** -(torch.arange(0, size, 2, device=position.device).float() / size)
    angle = (position.float()[..., None] * frequency).repeat(*[1] * position.dim(), 2)
    return angle.cos(), angle.sin()


def _turn(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def run(
    model: Any, config: Any, prefix: Any, prefix_at: Any, own: Any, own_at: Any, real: Any, m: int
) -> tuple[Any, Seen]:
    """Return the questions' last `m` columns after the final norm, (b, q, m, d), and what the lessons read.

    Args:
        model: transformers' LlamaModel or Qwen2Model.
        config: its configuration; as many heads for keys and values as for queries.
        prefix: what stands before the questions, (b, p, d).
        prefix_at: positions, (b, p).
        own: embedded tokens of the questions, (b, q, n, d).
        own_at: positions, (b, q, n).
        real: False in padding, (b, q, n).
        m: columns, from the right.
    """
    (b, p, d), (q, n) = prefix.shape, own.shape[1:3]
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    size, theta = d // heads, float(config.rope_parameters["rope_theta"])

    def norm(x: Any, weight: Any) -> Any:
        return F.rms_norm(x, (d,), weight, eps)

    def by_head(x: Any) -> Any:
        return x.reshape(b, p, heads, size).transpose(1, 2)

    def by_branch(x: Any) -> Any:
        return x.reshape(b, q, -1, heads, size).permute(0, 3, 1, 2, 4)

    turn = [x[:, None] for x in _angles(prefix_at, size, theta)]
    turn_own = [x[:, None] for x in _angles(own_at, size, theta)]
    sees = torch.ones(n, n, dtype=torch.bool, device=own.device).tril() & real[:, :, None, :]
    sees = sees | torch.eye(n, dtype=torch.bool, device=own.device)  # padding sees itself: no row without anything
    hidden = torch.zeros(sees.shape, device=own.device).masked_fill(~sees, -1e9)[:, None]
    logits: dict[int, Any] = {}
    into, head, after = prefix, own, own
    for number, layer in enumerate(model.layers):
        attention, last = layer.self_attn, number == len(model.layers) - 1
        there, here = norm(prefix, layer.input_layernorm.weight), norm(own, layer.input_layernorm.weight)
        keys, values = _turn(by_head(attention.k_proj(there)), *turn), by_head(attention.v_proj(there))
        own_keys = _turn(by_branch(attention.k_proj(here)), *turn_own)
        own_values = by_branch(attention.v_proj(here))
        columns = m if last else n
        own, here = own[:, :, n - columns :], here[:, :, n - columns :]
        queries = _turn(by_branch(attention.q_proj(here)), *(x[..., n - columns :, :] for x in turn_own)) * size**-0.5
        to_prefix = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (q, columns))
        to_own = queries @ own_keys.transpose(-1, -2) + hidden[..., n - columns :, :]
        both = torch.cat([to_prefix, to_own], -1)
        if number in (SEARCH_LAYER, CARRY_LAYER):
            logits[number] = both[:, 0]
        share = both.softmax(-1)
        mixed = (share[..., :p].flatten(2, 3) @ values).unflatten(2, (q, columns)) + share[..., p:] @ own_values
        if number == SEARCH_LAYER:
            into, head = there, mixed[:, 0]
        own = own + attention.o_proj(mixed.permute(0, 2, 3, 1, 4).flatten(3))
        own = own + layer.mlp(norm(own, layer.post_attention_layernorm.weight))
        if number == SEARCH_LAYER:
            after = own
        if not last:
            queries = _turn(by_head(attention.q_proj(there)), *turn)
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
            prefix = prefix + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            prefix = prefix + layer.mlp(norm(prefix, layer.post_attention_layernorm.weight))
    return norm(own, model.norm.weight), Seen(logits, into, head, after)
