"""What torch's attention kernel for rows of segments computes on a GPU, on a CPU and segment by segment."""

from __future__ import annotations

import itertools

import torch


def attend_by_segment(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """[T, H, E]. The last query of a segment sees its last key; `window_size` counts tokens to the left, and right."""
    assert (query_bounds.dtype, key_bounds.dtype) == (torch.int32, torch.int32)
    assert enable_gqa == (queries.shape[1] != keys.shape[1])
    groups = queries.shape[1] // keys.shape[1]
    left, right = window_size
    outputs, longest = [], (0, 0)
    spans = (list(itertools.pairwise(bounds)) for bounds in (query_bounds.tolist(), key_bounds.tolist()))
    for (start, stop), (first, last) in zip(*spans, strict=True):
        longest = max(longest[0], stop - start), max(longest[1], last - first)
        places = torch.arange(last - first - (stop - start), last - first)[:, None]
        others = torch.arange(last - first)[None, :]
        is_seen = (others <= places + right) & ((others >= places - left) | (left < 0))
        seen_keys, seen_values = (part[first:last].repeat_interleave(groups, 1) for part in (keys, values))
        scores = torch.einsum("qhe,khe->hqk", queries[start:stop], seen_keys) * scale
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khe->qhe", weights, seen_values))
    assert longest == (longest_query, longest_key)
    return torch.cat(outputs)
