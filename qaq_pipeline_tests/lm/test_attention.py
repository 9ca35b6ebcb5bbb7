"""attention: a packed row equals softmax attention computed token by token; unsupported arguments are refused.

Tolerances: the reference computes in fp64; numbers of size 1 to 3 summed in fp32 in another order differ by 1e-6, and
the bound is 1e-5. Results that must not change at all are compared bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qaq_pipeline.lm import attention
from qaq_pipeline.lm.attention import (
    AttentionUnsupportedError,
    PackedRow,
    Segment,
    SharedPrefix,
    packed_attention,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, SIZE = 4, 8
LENGTHS = (18, 1, 7)
"""Lengths of the segments of a row, longer and shorter than the windows."""


@dataclass(frozen=True)
class Operands:
    """Queries [1, H, T, E], keys [1, K, T, E] and values [1, K, T, E of values]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def rows(self, start: int, stop: int) -> Operands:
        rows = slice(start, stop)
        return Operands(self.query[:, :, rows], self.key[:, :, rows], self.value[:, :, rows])

    def before(self, other: Operands) -> Operands:
        """These tokens, followed by the other ones."""
        pairs = zip((self.query, self.key, self.value), (other.query, other.key, other.value), strict=True)
        return Operands(*(torch.cat(pair, dim=2) for pair in pairs))


def operands(length: int, seed: int, *, key_heads: int = HEADS, value_size: int = SIZE) -> Operands:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, SIZE), (key_heads, SIZE), (key_heads, value_size))
    return Operands(*(torch.randn(1, heads, length, size, generator=generator) * 2 for heads, size in sizes))


def attend(given: Operands, row: PackedRow, module: torch.nn.Module, **others: Any) -> torch.Tensor:
    output, weights = packed_attention(module, given.query, given.key, given.value, None, packed_row=row, **others)
    assert weights is None
    return output


def recorded(given: Operands, module: torch.nn.Module, **others: Any) -> SharedPrefix:
    """The prefix as a runner computes it: in a separate row."""
    prefix = SharedPrefix(given.query.shape[2])
    attend(given, PackedRow((Segment(0, prefix.length),), record=prefix), module, **others)
    return prefix


def packed_row(prefix: SharedPrefix | None) -> PackedRow:
    """Segments of LENGTHS; the first and the last follow the prefix, the middle one has none."""
    stops = [sum(LENGTHS[: number + 1]) for number in range(len(LENGTHS))]
    starts = [stop - length for stop, length in zip(stops, LENGTHS, strict=True)]
    return PackedRow(tuple(map(Segment, starts, stops, (prefix, None, prefix))))


def naive_attention(
    given: Operands, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """One sequence, token by token and head by head, in fp64: [1, T, H, E of values]."""
    _, num_heads, length, size = given.query.shape
    group = num_heads // given.key.shape[1]
    output = torch.zeros(1, length, num_heads, given.value.shape[3], dtype=torch.float64)
    for head in range(num_heads):
        keys, values = given.key[0, head // group].double(), given.value[0, head // group].double()
        for token in range(length):
            first = 0 if sliding_window is None else max(0, token + 1 - sliding_window)
            scores = keys[first : token + 1] @ given.query[0, head, token].double()
            scores *= size**-0.5 if scaling is None else scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[0, token, head] = torch.softmax(scores, 0) @ values[first : token + 1]
    return output


def naive_row(prefix: Operands | None, given: Operands, **others: Any) -> torch.Tensor:
    """The expected output of a row of LENGTHS: each segment as a separate sequence, after its prefix if it has one."""
    outputs = []
    for segment in packed_row(None).segments:
        alone = given.rows(segment.start, segment.stop)
        has_prefix = prefix is not None and segment.stop - segment.start != LENGTHS[1]
        whole = prefix.before(alone) if prefix is not None and has_prefix else alone
        outputs.append(naive_attention(whole, **others)[:, -(segment.stop - segment.start) :])
    return torch.cat(outputs, dim=1).float()


# --- what a token sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_length", [0, 1, 5, 20])
@pytest.mark.parametrize("window", [None, 1, 4, 19, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_a_packed_row_equals_the_attention_of_each_sequence_alone(
    prefix_length: int, window: int | None, softcap: float | None, key_heads: int
) -> None:
    module = torch.nn.Identity()
    options: dict[str, Any] = {"sliding_window": window, "softcap": softcap}
    given = operands(sum(LENGTHS), seed=1, key_heads=key_heads)
    beginning = operands(prefix_length, seed=2, key_heads=key_heads) if prefix_length else None
    prefix = None if beginning is None else recorded(beginning, module, **options)
    output = attend(given, packed_row(prefix), module, **options)
    torch.testing.assert_close(output, naive_row(beginning, given, **options), atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_row_of_a_prefix_is_attended_like_any_other(softcap: float | None) -> None:
    given = operands(20, seed=3)
    row = PackedRow((Segment(0, 20),), record=SharedPrefix(20))
    output = attend(given, row, torch.nn.Identity(), softcap=softcap, sliding_window=6)
    naive = naive_attention(given, softcap=softcap, sliding_window=6).float()
    torch.testing.assert_close(output, naive, atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scaling", [0.1, 1.0])
def test_the_factor_of_the_scores_is_the_architectures(scaling: float, softcap: float | None) -> None:
    module, given, beginning = torch.nn.Identity(), operands(sum(LENGTHS), seed=1), operands(5, seed=2)
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
    output = attend(given, packed_row(recorded(beginning, module, **options)), module, **options)
    torch.testing.assert_close(output, naive_row(beginning, given, **options), atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_may_have_another_size_than_keys(softcap: float | None) -> None:
    module = torch.nn.Identity()
    given, beginning = operands(sum(LENGTHS), seed=1, value_size=6), operands(5, seed=2, value_size=6)
    output = attend(given, packed_row(recorded(beginning, module)), module, softcap=softcap)
    assert output.shape == (1, sum(LENGTHS), HEADS, 6)
    torch.testing.assert_close(output, naive_row(beginning, given, softcap=softcap), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix_length", [0, 5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision_and_right(
    dtype: torch.dtype, softcap: float | None, window: int | None, prefix_length: int
) -> None:
    """bfloat16 has 8 bits: scores of size 10 have errors of 0.04, which change a value of size 4 by 0.2."""
    module = torch.nn.Identity()
    options: dict[str, Any] = {"sliding_window": window, "softcap": softcap}

    def halved(full: Operands) -> Operands:
        return Operands(full.query.to(dtype) / 4, full.key.to(dtype), full.value.to(dtype))

    given = halved(operands(sum(LENGTHS), seed=1))
    beginning = halved(operands(prefix_length, seed=2)) if prefix_length else None
    prefix = None if beginning is None else recorded(beginning, module, **options)
    output = attend(given, packed_row(prefix), module, **options)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), naive_row(beginning, given, **options), atol=0.05, rtol=0)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_token_sees_neither_its_neighbours_nor_what_stands_to_its_right(
    window: int | None, softcap: float | None
) -> None:
    module, beginning = torch.nn.Identity(), operands(5, seed=2)
    options: dict[str, Any] = {"sliding_window": window, "softcap": softcap}
    prefix = recorded(beginning, module, **options)
    given, others = operands(sum(LENGTHS), seed=1), operands(sum(LENGTHS), seed=9)
    output = attend(given, packed_row(prefix), module, **options)
    last = sum(LENGTHS) - LENGTHS[-1]
    seen = given.rows(last, last + 3)
    changed = others.rows(0, last).before(seen).before(others.rows(last + 3, sum(LENGTHS)))
    moved = attend(changed, packed_row(prefix), module, **options)
    torch.testing.assert_close(moved[:, last : last + 3], output[:, last : last + 3], atol=1e-6, rtol=0)
    assert (moved[:, last + 3 :] - output[:, last + 3 :]).abs().amax() > 0.1


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(None, 4), (4, None), (4, 6)])
def test_layers_of_different_windows_share_a_row_and_take_each_their_own_mask(
    windows: tuple[int | None, int | None],
) -> None:
    layers = [torch.nn.Identity(), torch.nn.Identity()]
    beginning, given = operands(5, seed=2), operands(sum(LENGTHS), seed=1)
    prefix = SharedPrefix(5)
    for layer in layers:
        attend(beginning, PackedRow((Segment(0, 5),), record=prefix), layer)
    row = packed_row(prefix)
    for layer, window in zip(layers, windows, strict=True):
        output = attend(given, row, layer, sliding_window=window)
        naive = naive_row(beginning, given, sliding_window=window)
        torch.testing.assert_close(output, naive, atol=1e-5, rtol=0)


def test_each_layer_continues_its_own_keys_and_values() -> None:
    layers = [torch.nn.Identity(), torch.nn.Identity()]
    beginnings = [operands(5, seed=seed) for seed in (2, 3)]
    prefix = SharedPrefix(5)
    for layer, beginning in zip(layers, beginnings, strict=True):
        attend(beginning, PackedRow((Segment(0, 5),), record=prefix), layer)
    given = operands(sum(LENGTHS), seed=1)
    row = packed_row(prefix)
    for layer, beginning in zip(layers, beginnings, strict=True):
        torch.testing.assert_close(attend(given, row, layer), naive_row(beginning, given), atol=1e-5, rtol=0)


def test_a_mask_is_made_once_for_all_layers() -> None:
    module, given = torch.nn.Identity(), operands(sum(LENGTHS), seed=1)
    row = packed_row(recorded(operands(5, seed=2), module))
    attend(given, row, module)
    masks = dict(row.masks)
    attend(given, row, module)
    assert masks.keys() == {(LENGTHS[0], 5, None), (LENGTHS[2], 5, None)}
    assert all(row.masks[kept] is mask for kept, mask in masks.items())


def test_two_segments_may_continue_two_prefixes() -> None:
    module = torch.nn.Identity()
    beginnings = [operands(5, seed=2), operands(5, seed=3), operands(12, seed=4)]
    given = operands(9, seed=1)
    segments = (Segment(number * 3, number * 3 + 3, recorded(one, module)) for number, one in enumerate(beginnings))
    output = attend(given, PackedRow(tuple(segments)), module)
    for number, beginning in enumerate(beginnings):
        rows = slice(number * 3, number * 3 + 3)
        naive = naive_attention(beginning.before(given.rows(rows.start, rows.stop)))[:, -3:].float()
        torch.testing.assert_close(output[:, rows], naive, atol=1e-5, rtol=0)


# --- what is refused -------------------------------------------------------------------------------------------------


class SinkAttention(torch.nn.Module):
    """An attention layer in name only: each test sets its arguments."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


ROW = PackedRow((Segment(0, 3),))


@pytest.mark.parametrize(
    ("attributes", "arguments", "reason"),
    [
        pytest.param({}, {"s_aux": torch.zeros(HEADS)}, "requires s_aux$", id="sinks"),
        pytest.param({}, {"z": 1, "alibi": False}, "requires alibi, z$", id="two unknown ones"),
        pytest.param({}, {"attention_mask": torch.zeros(1, 1, 3, 3)}, "requires a mask", id="mask"),
        pytest.param({}, {"dropout": 0.1}, "requires .*dropout", id="dropout"),
        pytest.param({"is_causal": False}, {}, "requires .*attention to the right", id="bidirectional"),
        pytest.param({}, {"packed_row": None}, "does not receive `packed_row`$", id="no row"),
    ],
)
def test_what_a_packed_row_cannot_give_is_refused_by_name(
    attributes: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    given = operands(3, seed=1)
    handed: dict[str, Any] = {"attention_mask": None, "packed_row": ROW} | arguments
    with pytest.raises(AttentionUnsupportedError, match=f"^SinkAttention {reason}"):
        packed_attention(SinkAttention(**attributes), given.query, given.key, given.value, **handed)


@pytest.mark.parametrize(
    "arguments",
    [
        {"s_aux": None},
        {"position_ids": torch.arange(3)[None], "cache_position": torch.arange(3), "use_cache": False},
        {"output_attentions": False, "output_hidden_states": False},
    ],
)
def test_what_changes_nothing_is_no_reason_to_refuse(arguments: dict[str, Any]) -> None:
    given = operands(3, seed=1)
    output = attend(given, ROW, SinkAttention(is_causal=True), **arguments)
    assert torch.equal(output, attend(given, ROW, SinkAttention()))
    assert math.isfinite(float(output.sum()))


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 70])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_in_blocks_is_attention(length: int, prefix: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(length + prefix)
    query = torch.randn(1, 2 * groups, length, 16, generator=generator)
    key, value = (torch.randn(1, 2, prefix + length, size, generator=generator) for size in (16, 8))
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    hidden = torch.ones(length, prefix + length, dtype=torch.bool).triu(prefix + 1)
    expected = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value.repeat_interleave(groups, 1)
    torch.testing.assert_close(attention._attend_in_blocks(query, key, value, prefix, 0.3), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "length", "window", "in_blocks"),
    [
        (torch.bfloat16, attention.LONG_ENOUGH_FOR_BLOCKS, None, True),
        (torch.bfloat16, attention.LONG_ENOUGH_FOR_BLOCKS, 10_000, True),
        (torch.bfloat16, attention.LONG_ENOUGH_FOR_BLOCKS, 30, False),
        (torch.bfloat16, attention.LONG_ENOUGH_FOR_BLOCKS - 1, None, False),
        (torch.float32, 2 * attention.LONG_ENOUGH_FOR_BLOCKS, None, False),
    ],
)
def test_long_segments_in_half_precision_go_by_blocks_and_come_out_the_same(
    dtype: torch.dtype, length: int, window: int | None, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    kept = attention._attend_in_blocks

    def spied(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return kept(*arguments)

    monkeypatch.setattr(attention, "_attend_in_blocks", spied)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        row = PackedRow((Segment(0, length),))
        return packed_attention(torch.nn.Module(), query, key, value, None, sliding_window=window, packed_row=row)[0]

    expected, output = attend(query, key, value), attend(query.to(dtype), key.to(dtype), value.to(dtype))
    assert bool(calls) is in_blocks
    torch.testing.assert_close(output.float(), expected, atol=0.03 if dtype == torch.bfloat16 else 1e-6, rtol=0)
