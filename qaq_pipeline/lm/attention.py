"""Attention over packed rows: several sequences in one row of tokens, each of which attends to itself and its prefix.

Belongs here: the division of a row into segments, the keys and values of a prefix, and the attention over both.
Does not belong here: the choice of sequences in a row and their positions (`runners`), and the output head (`lm_head`).

    one row     [ segment 0 | segment 1 | segment 2 ]         no padding, one matrix product for all segments
    segment 1 attends to  [ its prefix, computed once ] + [ itself, causally ]

It is registered with transformers under `PACKED`, so every architecture that uses transformers' attention interface
can use it: rotary positions, grouped heads and norms are applied before it, the output projection after it.

Shape suffixes: H heads, K key-value heads, S tokens of a segment, P of its prefix, T of the row, E size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "qaq_packed"

LONG_ENOUGH_FOR_BLOCKS = 128
BLOCK_QUERIES = 64
"""For segments of at least `LONG_ENOUGH_FOR_BLOCKS` tokens, attention in blocks of `BLOCK_QUERIES` queries is faster
than torch's kernel in half precision on a CPU, but not in fp32."""

_WITHOUT_EFFECT = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
)
"""Arguments that architectures pass to an attention function and that have no effect on `packed_attention`."""


class AttentionUnsupportedError(ValueError):
    """An architecture needs something that packed rows do not support. The text names it."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Keys and values of a prefix that many sequences share, layer by layer."""

    length: int
    by_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Keys and values [1, K, P, E] of each attention module, by its id."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of the row, which follow the prefix."""

    start: int
    stop: int
    prefix: SharedPrefix | None = None


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """The segments of a row as arrays on the device, for one call of a kernel that attends to all of them."""

    query_bounds: torch.Tensor
    """Where each segment begins and ends in the row: int32 [number of segments + 1]."""
    key_bounds: torch.Tensor
    """The same among the keys, where each segment follows its prefix."""
    longest_query: int
    longest_key: int
    prefixes: tuple[SharedPrefix, ...] = ()
    key_places: torch.Tensor | None = None
    """Places of the keys in the prefixes and the row, one after another; None: they are those of the row."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """The division of a row of tokens. If `record` is set, the row is a prefix, and it stores its keys and values."""

    segments: tuple[Segment, ...]
    record: SharedPrefix | None = None
    varlen: VarlenLayout | None = None
    """If set, a GPU's kernel attends to all segments at once; else they are attended to one by one."""
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    """Masks of this row by (segment length, prefix length, effective window), shared by all layers."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_row: PackedRow | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over one packed row, with the signature of transformers' attention interface.

    Args:
        module: the attention layer.
        query: [1, H, T, E].
        key: [1, K, T, E].
        value: [1, K, T, E].
        attention_mask: must be None; `packed_row` replaces it.
        scaling: factor of the scores; default 1 / sqrt(E).
        dropout: must be 0.
        sliding_window: number of tokens that a token sees, including itself.
        softcap: bound of the scores, applied by tanh.
        packed_row: the division of the row.
        **others: further arguments of the architecture.

    Returns:
        The output [1, T, H, E], and None for the weights.

    Raises:
        AttentionUnsupportedError: the architecture passes an argument that affects attention and is not supported, or
            does not pass `packed_row`.
    """
    demands = sorted(name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT)
    demands += ["a mask"] * (attention_mask is not None) + ["dropout"] * bool(dropout)
    demands += ["attention to the right"] * (not getattr(module, "is_causal", True))
    if demands:
        raise AttentionUnsupportedError(f"{type(module).__name__} requires {', '.join(demands)}")
    if packed_row is None:
        raise AttentionUnsupportedError(f"{type(module).__name__} does not receive `packed_row`")
    # In mixed precision rotations are in fp32, and the products below have dtypes of their own.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if packed_row.record is not None:
        packed_row.record.by_layer[id(module)] = (key, value)
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    attended = (module, query, key, value, packed_row, scaling, sliding_window, softcap)
    if not torch.is_autocast_enabled(query.device.type):  # Leaving it takes time in each layer.
        return _attend_to_row(*attended), None
    with torch.autocast(query.device.type, enabled=False):
        return _attend_to_row(*attended), None


AttentionInterface.register(PACKED, packed_attention)


def _attend_to_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed_row: PackedRow,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention over one packed row, [1, T, H, E]; the arguments are those of `packed_attention`."""
    if packed_row.varlen is not None:
        if softcap is not None:
            raise AttentionUnsupportedError(f"{type(module).__name__} caps its scores, which no kernel for rows does")
        return _attend_at_once(module, query, key, value, packed_row.varlen, scaling, sliding_window)[None]
    outputs = []
    for segment in packed_row.segments:
        tokens = slice(segment.start, segment.stop)
        keys, values, prefix_length = _with_prefix(segment, module, key[:, :, tokens], value[:, :, tokens])
        length = segment.stop - segment.start
        window = sliding_window if sliding_window is not None and length + prefix_length > sliding_window else None
        is_slow = query.device.type == "cpu" and query.dtype != torch.float32 and length >= LONG_ENOUGH_FOR_BLOCKS
        if is_slow and softcap is None and window is None:
            outputs.append(_attend_in_blocks(query[:, :, tokens], keys, values, prefix_length, scaling))
        else:
            mask = _mask(packed_row, length, prefix_length, window, query)
            outputs.append(_attend(query[:, :, tokens], keys, values, mask, scaling, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def varlen_arrays(segments: Sequence[Segment]) -> list[torch.Tensor]:
    """What `varlen_layout` needs on the device: the bounds of queries and of keys, and the places of the keys."""
    begins, in_row = {}, 0
    for prefix in _prefixes_of(segments):
        begins[id(prefix)] = in_row
        in_row += prefix.length
    places, num_keys = [], [0]
    for segment in segments:
        length = 0
        if segment.prefix is not None:
            begin, length = begins[id(segment.prefix)], segment.prefix.length
            places.append(np.arange(begin, begin + length))
        places.append(np.arange(in_row + segment.start, in_row + segment.stop))
        num_keys.append(length + segment.stop - segment.start)
    bounds = (np.array([0, *(segment.stop for segment in segments)]), np.cumsum(num_keys))
    return [torch.from_numpy(array) for array in (*bounds, np.concatenate(places))]


def varlen_layout(
    segments: Sequence[Segment], query_bounds: torch.Tensor, key_bounds: torch.Tensor, key_places: torch.Tensor
) -> VarlenLayout:
    """The layout of segments that follow one another, from their `varlen_arrays` on the device."""
    lengths = [segment.stop - segment.start for segment in segments]
    before = [segment.prefix.length if segment.prefix is not None else 0 for segment in segments]
    prefixes = _prefixes_of(segments)
    return VarlenLayout(
        query_bounds.int(),
        key_bounds.int(),
        max(lengths),
        max(map(sum, zip(lengths, before, strict=True))),
        prefixes,
        key_places if prefixes else None,
    )


def _prefixes_of(segments: Sequence[Segment]) -> tuple[SharedPrefix, ...]:
    """The distinct prefixes, in the order of the segments."""
    return tuple({id(one.prefix): one.prefix for one in segments if one.prefix is not None}.values())


def varlen_kernel() -> Callable[..., Any]:
    """Attention over segments of different lengths, in half precision on a GPU; tests replace it."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _attend_at_once(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: VarlenLayout,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of all segments, [T, H, E].

    The last query of a segment sees its last key, and each query before it one key fewer. So a segment sees its whole
    prefix.
    """
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.key_places is not None:
        before = [prefix.by_layer[id(module)] for prefix in layout.prefixes]
        keys = torch.cat([*(keys_1KPE[0].transpose(0, 1) for keys_1KPE, _ in before), keys])[layout.key_places]
        values = torch.cat([*(values_1KPE[0].transpose(0, 1) for _, values_1KPE in before), values])[layout.key_places]
    return varlen_kernel()(
        queries,
        keys,
        values,
        layout.query_bounds,
        layout.key_bounds,
        layout.longest_query,
        layout.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=keys.shape[1] != queries.shape[1],
    )


def _with_prefix(
    segment: Segment, module: torch.nn.Module, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and values of a segment behind those of its shared prefix, and the length of the prefix."""
    if segment.prefix is None:
        return keys, values, 0
    prefix_keys, prefix_values = segment.prefix.by_layer[id(module)]
    return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2), segment.prefix.length


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one segment, [1, H, S, E]; plain causal if there is no mask.

    The softcap follows Gemma 2: `softmax(softcap * tanh(q k^T * scaling / softcap)) v`, with the softmax in fp32.
    """
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap)) * softcap
    if mask is None:
        mask = _causal(query.shape[2], 0, None, query)
    return torch.softmax((scores + mask).float(), dim=-1).to(query.dtype) @ value


def _attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix: int, scaling: float
) -> torch.Tensor:
    """Causal attention of one segment and its prefix, [1, H, S, E], in blocks of queries; softmax in fp32.

    Scores of hidden keys are not computed, and only the diagonal of a block needs a mask. In bfloat16 on a CPU this
    takes 0.55 to 0.8 of the time of torch's kernel.
    """
    num_kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    length, size = query.shape[2], value.shape[3]
    queries = query[0].unflatten(0, (num_kv_heads, groups))
    keys, values = key[0].float().transpose(1, 2), value[0]
    outputs = value.new_empty(num_kv_heads, groups, length, size)
    for start in range(0, length, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, length)
        rows, seen = stop - start, prefix + stop
        block = queries[:, :, start:stop].reshape(num_kv_heads, groups * rows, -1).float()
        scores = torch.bmm(block, keys[:, :, :seen]).mul_(scaling).view(num_kv_heads, groups, rows, seen)
        scores[..., prefix + start :] += _causal(rows, 0, None, scores)
        weights = torch.softmax(scores, dim=-1).to(value.dtype).view(num_kv_heads, groups * rows, seen)
        outputs[:, :, start:stop] = torch.bmm(weights, values[:, :seen]).view(num_kv_heads, groups, rows, size)
    return outputs.flatten(0, 1)[None]


def _mask(row: PackedRow, length: int, prefix: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """Mask [S, P + S] to add to the scores; None if plain causal attention is equivalent."""
    if not prefix and window is None:
        return None
    kept = (length, prefix, window)
    if kept not in row.masks:
        row.masks[kept] = _causal(*kept, like)
    return row.masks[kept]


def _causal(length: int, prefix: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Mask [S, P + S]: 0 if query i of the segment sees key j of prefix and segment, else -inf."""
    queries = torch.arange(prefix, prefix + length, device=like.device)[:, None]
    keys = torch.arange(prefix + length, device=like.device)[None, :]
    is_hidden = keys > queries
    if window is not None:
        is_hidden |= keys <= queries - window
    return torch.zeros(is_hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(is_hidden, -math.inf)
