"""lm_head: equal to the naive formulas of the docstrings, over dtypes; the head processes target rows only.

Hidden states come as padded rows, as one packed row, or as a packed row without the shared prefixes. Each test that
scores a batch does so in all three layouts.

Tolerances: fp32 has 24 bits, so a logit of size s is known to s * 2**-24. The fast path may be as far from the fp64
value as the naive path is, plus a few such units: both sum the same numbers in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Literal, get_args

import pytest
import torch

from qaq_pipeline.lm import lm_head
from qaq_pipeline.lm.lm_head import by_target, row_logprobs, target_ids, target_positions, token_logprobs
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.schema.vocabularies import Quantity

Layout = Literal["padded", "packed", "without_prefixes"]

CPU = torch.device("cpu")
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
VOCABULARY, HIDDEN = 50, 16
UNIT = 2.0**-24

pytestmark = pytest.mark.usefixtures("one_thread")


def sequence(ids: list[int], *spans: tuple[int, int]) -> TokenSequence:
    """All tokens before the one that predicts the first target count as shared."""
    quantities = list(Quantity)
    targets = tuple(Target(quantities[number], *span) for number, span in enumerate(spans))
    return TokenSequence("p", ids, targets, max(min(start for start, _ in spans) - 1, 0))


def hidden_bounds(sequences: list[TokenSequence], layout: Layout) -> list[tuple[int, int]]:
    """For each sequence, the hidden states [first, stop) in the layout; padding follows its end."""
    lengths = [len(one.token_ids) for one in sequences]
    if layout == "padded":
        return [(0, max(lengths))] * len(lengths)
    skipped = [one.num_shared if layout == "without_prefixes" else 0 for one in sequences]
    return list(zip(skipped, lengths, strict=True))


class ToyModel:
    """A causal body (running mean of embeddings, so a token sees all before it) and a head that counts its rows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self._embedding_VD = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
        self._head_DV = (torch.randn(HIDDEN, VOCABULARY, generator=generator) * 2).to(dtype)
        self.head_rows: list[torch.Tensor] = []

    def body(self, ids: list[int]) -> torch.Tensor:
        counts_T1 = torch.arange(1, len(ids) + 1)[:, None]
        return self._embedding_VD[torch.tensor(ids)].cumsum(0) / counts_T1

    def head(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        self.head_rows.append(hidden_ND)
        return hidden_ND.to(self._head_DV.dtype) @ self._head_DV

    def batch_logprobs(
        self,
        sequences: list[TokenSequence],
        layout: Layout = "packed",
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[list[torch.Tensor]]:
        bounds = hidden_bounds(sequences, layout)
        padded = [
            one.token_ids + [0] * (stop - len(one.token_ids)) for one, (_, stop) in zip(sequences, bounds, strict=True)
        ]
        rows = [self.body(ids)[first:] for ids, (first, _) in zip(padded, bounds, strict=True)]
        ends = accumulate(len(row) for row in rows)
        starts = [end - stop for end, (_, stop) in zip(ends, bounds, strict=True)]
        chosen = head or self.head
        logprobs_N = row_logprobs(
            torch.cat(rows),
            lambda hidden_ND, targets_NK: token_logprobs(chosen(hidden_ND), targets_NK),
            target_positions(sequences, starts),
            target_ids(sequences),
        )
        return by_target(logprobs_N, sequences)

    def naive(self, ids: list[int], start: int, stop: int) -> torch.Tensor:
        """The formula of `row_logprobs`, one sequence alone: `log_softmax(head(body(ids))[start - 1 : stop - 1])`."""
        logits_TV = (self.body(ids).to(self._head_DV.dtype) @ self._head_DV).float()
        logprobs_NV = torch.log_softmax(logits_TV[start - 1 : stop - 1], dim=-1)
        return torch.stack([row[token] for row, token in zip(logprobs_NV, ids[start:stop], strict=True)])


def random_sequences(number: int, seed: int = 1) -> list[TokenSequence]:
    """Sequences of 2 to 40 tokens, each with one or two targets."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(number):
        length = int(torch.randint(2, 41, (1,), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        start = int(torch.randint(1, length, (1,), generator=generator))
        middle = (start + length) // 2
        spans = [(start, length)] if middle == start else [(start, middle), (middle, length)]
        drawn.append(sequence(ids, *spans))
    return drawn


# --- token_logprobs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
def test_token_logprobs_are_no_worse_than_the_naive_log_softmax(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = (torch.randn(64, 5000, generator=generator) * scale).to(dtype)
    targets_N = torch.randint(0, 5000, (64,), generator=generator)
    rows = torch.arange(64)

    fast_N = token_logprobs(logits_NV, targets_N[:, None])
    naive_N = torch.log_softmax(logits_NV.float(), -1)[rows, targets_N]
    exact_N = torch.log_softmax(logits_NV.double(), -1)[rows, targets_N]

    assert fast_N.dtype == torch.float32
    # The rounded numbers: logits, and their logsumexp, which is at least log 5000 even if they are small.
    largest = max(float(logits_NV.float().abs().max()), float(exact_N.abs().max()))
    assert (fast_N - exact_N).abs().max() <= (naive_N - exact_N).abs().max() + 8 * UNIT * largest
    assert (fast_N - naive_N).abs().max() <= 16 * UNIT * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8])
@pytest.mark.parametrize("cached_floats", [1, 100, 300, 10_000])
def test_the_logsumexp_by_blocks_equals_the_one_in_one_piece(
    cached_floats: int, num_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "CACHED_FLOATS", cached_floats)
    logits_NV = (torch.randn(num_rows, 100, generator=torch.Generator().manual_seed(num_rows)) * 20).to(dtype)
    before = logits_NV.clone()
    fast_N = lm_head.logsumexp_fp32(logits_NV)
    assert fast_N.dtype == torch.float32
    torch.testing.assert_close(fast_N, logits_NV.float().logsumexp(-1), atol=16 * UNIT * 100, rtol=0)
    assert torch.equal(logits_NV, before)


def test_token_logprobs_of_equal_logits_are_minus_the_log_of_the_vocabulary() -> None:
    assert token_logprobs(torch.full((1, 8), 3.0), torch.tensor([[5]])).item() == pytest.approx(-math.log(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_logprob_of_any_of_several_tokens_is_that_of_their_sum(dtype: torch.dtype, scale: float) -> None:
    """Rows with one, two and three tokens; -1, and an id that the vocabulary does not have, are no tokens."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (torch.randn(4, 50, generator=generator) * scale).to(dtype)
    rows = [[3], [3, 49], [0, 7, 20], [7]]
    targets_NK = torch.tensor([[3, -1, -1], [3, 49, -1], [0, 7, 20], [50, 7, 9999]])
    probabilities_NV = torch.softmax(logits_NV.double(), -1)
    exact = [math.log(math.fsum(probabilities_NV[n, row].tolist())) for n, row in enumerate(rows)]
    torch.testing.assert_close(token_logprobs(logits_NV, targets_NK).double(), torch.tensor(exact).double())


def test_a_token_beside_longer_rows_has_the_value_that_it_has_alone() -> None:
    logits_NV = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 20
    targets_N = torch.tensor([0, 3, 9, 20, 48, 49])
    padded_NK = torch.nn.functional.pad(targets_N[:, None], (0, 3), value=-1)
    assert torch.equal(token_logprobs(logits_NV, padded_NK), token_logprobs(logits_NV, targets_N[:, None]))


def test_of_no_token_at_all_the_probability_is_zero() -> None:
    assert token_logprobs(torch.randn(1, 8), torch.tensor([[-1, 8]])).item() == -math.inf


def test_target_ids_are_those_of_the_text_or_the_end_tokens_in_the_order_of_the_positions() -> None:
    text = sequence([1, 2, 3, 4, 5], (3, 5), (1, 2))
    end = TokenSequence("p", [6, 7, 8], (Target(Quantity.END, 1, 2, any_of=(20, 30)), Target(Quantity.Q, 2, 3)))
    assert target_ids([text]).tolist() == [[4], [5], [2]]
    assert target_ids([end, text]).tolist() == [[20, 30], [8, -1], [4, -1], [5, -1], [2, -1]]
    assert target_ids([]).shape == (0, 1)


def test_token_logprobs_leave_their_input_alone() -> None:
    logits_NV = torch.randn(4, 9)
    before = logits_NV.clone()
    token_logprobs(logits_NV, torch.tensor([[0], [1], [2], [3]]))
    assert torch.equal(logits_NV, before)


@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        ([0.0, -math.inf], 0, 0.0),
        ([0.0, -math.inf], 1, -math.inf),
        ([0.0, math.nan], 0, math.nan),
        ([0.0, math.inf], 0, math.nan),
        ([1e30, 0.0], 0, 0.0),
    ],
)
def test_what_is_not_finite_stays_visibly_so(logits: list[float], target: int, expected: float) -> None:
    value = token_logprobs(torch.tensor([logits]), torch.tensor([[target]])).item()
    # An infinite logit yields -inf or NaN, never a finite number.
    assert value == expected or (math.isnan(expected) and not math.isfinite(value))


# --- the token shift -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        pytest.param([0, 5], [2, 3, 4, 5 + 3, 5 + 1], id="one after another"),
        pytest.param([0, 8], [2, 3, 4, 8 + 3, 8 + 1], id="padded to eight"),
        pytest.param([-1, 3], [1, 2, 3, 3 + 3, 3 + 1], id="a prefix of one token is not in the row"),
    ],
)
def test_target_positions_are_flat_sequence_by_sequence_target_by_target(
    starts: list[int], expected: list[int]
) -> None:
    sequences = [sequence([1, 2, 3, 4, 5], (2, 5)), sequence([1, 2, 3, 4], (3, 4), (1, 2))]
    assert target_positions(sequences, starts).tolist() == expected


def test_a_target_token_is_read_from_the_hidden_state_before_it() -> None:
    """The diagram in `target_positions`: h1 h2 h3 predict q1 q2 q3 at 2, 3, 4."""
    model = ToyModel()
    ids = [1, 2, 3, 4, 5]
    model.batch_logprobs([sequence(ids, (2, 5))])
    (rows_ND,) = model.head_rows
    assert torch.equal(rows_ND, model.body(ids)[1:4])


@pytest.mark.parametrize("spans", [[(0, 3)], [(2, 3), (0, 1)]])
def test_a_target_that_begins_at_zero_is_an_error_and_reads_no_other_sequence(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="begins at position 0: its first token has no left context"):
        ToyModel().batch_logprobs([sequence([1, 2, 3], (1, 3)), sequence([4, 5, 6], *spans)])


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_equals_the_naive_formula_one_sequence_at_a_time(dtype: torch.dtype, layout: Layout) -> None:
    model, sequences = ToyModel(dtype), random_sequences(30)
    for one, values in zip(sequences, model.batch_logprobs(sequences, layout), strict=True):
        assert len(values) == len(one.targets)
        for target, value in zip(one.targets, values, strict=True):
            naive = model.naive(one.token_ids, target.start, target.stop)
            assert value.shape == (target.stop - target.start,)
            assert (value.dtype, value.device) == (torch.float32, CPU)
            # A matrix product of another shape may round a bf16 logit to its neighbour: 8 bits of about 20.
            torch.testing.assert_close(value, naive, atol=1e-5 if dtype == torch.float32 else 0.15, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_order_nor_company_nor_padding_moves_a_logprob(layout: Layout) -> None:
    model, sequences = ToyModel(), random_sequences(20)
    together = model.batch_logprobs(sequences)
    reversed_order = model.batch_logprobs(sequences[::-1], layout)[::-1]
    longer = sequence([3] * 200, (1, 200))
    in_company = model.batch_logprobs([*sequences, longer], layout)[:-1]
    alone = [model.batch_logprobs([one], layout)[0] for one in sequences]
    for variant in (reversed_order, in_company, alone):
        torch.testing.assert_close(variant, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_fault_4_the_head_sees_target_rows_only_in_chunks(
    chunk: int, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "ROWS_PER_CHUNK_CPU", chunk)
    model, sequences = ToyModel(), random_sequences(30)
    values = model.batch_logprobs(sequences, layout)
    seen = [rows_ND.shape[0] for rows_ND in model.head_rows]
    num_targets = sum(target.stop - target.start for one in sequences for target in one.targets)
    assert max(seen) <= chunk
    assert sum(seen) == num_targets < sum(len(one.token_ids) for one in sequences)
    hidden = [model.body(one.token_ids) for one in sequences]
    expected = [h[t.start - 1 : t.stop - 1] for h, one in zip(hidden, sequences, strict=True) for t in one.targets]
    torch.testing.assert_close(torch.cat(model.head_rows), torch.cat(expected), atol=1e-5, rtol=0)
    monkeypatch.undo()
    torch.testing.assert_close(model.batch_logprobs(sequences, layout), values, atol=1e-5, rtol=0)


def test_a_whole_batch_of_targets_is_split_at_the_chunk_size_of_the_device() -> None:
    model = ToyModel()
    length = 2 * lm_head.ROWS_PER_CHUNK_CPU + 2
    model.batch_logprobs([sequence([1] * length, (1, length))])
    assert [rows_ND.shape[0] for rows_ND in model.head_rows] == [lm_head.ROWS_PER_CHUNK_CPU] * 2 + [1]


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    model = ToyModel()
    sequences = [sequence([1, 2, 3], (1, 3)), sequence([4, 5, 6], (1, 3))]
    good = model.batch_logprobs(sequences)

    def spoiled(hidden_ND: torch.Tensor) -> torch.Tensor:
        logits_NV = model.head(hidden_ND)
        logits_NV[0] = math.nan
        return logits_NV

    ((first,), (second,)) = model.batch_logprobs(sequences, head=spoiled)
    assert not torch.isfinite(first).all()
    torch.testing.assert_close(second, good[1][0], atol=1e-6, rtol=0)
