"""logprobs: the Logprobs table against the naive reference, its invariances, the cache, and pairs without scores.

Tolerances: 1e-4 nats per token against the naive path (two different orders of the same fp32 sums); 1e-5 nats per
token between two runs of the fast path, which differ only in the shape of their batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from transformers import AutoModelForCausalLM

from qaq_pipeline.config.settings import ScoringSettings, Settings
from qaq_pipeline.lm import causal_lm, model_files
from qaq_pipeline.lm.batching import BatchTooLargeError
from qaq_pipeline.lm.prompts import Pair, PairEncoder, TokenSequence
from qaq_pipeline.lm.tokenizer import load_tokenizer
from qaq_pipeline.lm.workers import ScorerFacts, SequenceScorer
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.tables import Logprobs
from qaq_pipeline.schema.vocabularies import QUANTITIES_OF, NullReason, Quantity
from qaq_pipeline.scoring import logprobs
from qaq_pipeline.scoring.logprobs import (
    TYPICAL_SHARE,
    Estimate,
    Progress,
    ScoringModel,
    ScoringReport,
    justified_processes,
    score_pairs,
    typical_share,
)
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.planner import wanted_quantities
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.frames import TEXTS
from qaq_pipeline_tests.support.naive import (
    BOS,
    ENDS,
    FRAMES,
    PRIORS,
    SYSTEM,
    contexts,
    naive_nll,
    naive_nll_of_any,
    text,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NAIVE_TOLERANCE = 1e-4
RUN_TOLERANCE = 1e-5
QUERY_SIDE = (Quantity.Q, Quantity.Q_GIVEN_A)
SUMS = [f"sum_nll_{quantity}" for quantity in Quantity]


class Scorings:
    """Runs the scorings of one test, counts how often a model is loaded, and records the batches that it scores."""

    def __init__(self, settings_for: Callable[..., Settings], storage: Storage) -> None:
        self._settings_for = settings_for
        self.storage = storage
        self.num_loads = 0
        self.scored: list[list[TokenSequence]] = []
        self.wrap: Callable[[SequenceScorer], SequenceScorer] = lambda scorer: scorer

    def model(self, settings: Settings, role: str = "strong") -> ScoringModel:
        section = settings.models[role]
        files = model_files.locate(section, settings.model_cache_dir)
        tokenizer = load_tokenizer(section, files, settings.model_cache_dir)
        encoder = PairEncoder(tokenizer, section, settings.scoring)
        identity = ScoreIdentity(
            model=files.name,
            revision=files.revision,
            tokenizer_hash=files.tokenizer_hash(),
            template_hash=encoder.template_hash(),
            prior=settings.scoring.prior,
            dtype=section.dtype,
            max_tokens=settings.scoring.max_tokens,
            too_long=settings.scoring.too_long,
        )

        def load() -> SequenceScorer:
            self.num_loads += 1
            return Recorder(self.wrap(causal_lm.load_model(section, files)), self.scored)

        return ScoringModel(role, encoder, identity, lambda *_: contextlib.nullcontext(load()))

    def __call__(
        self,
        pairs: Sequence[Pair],
        *,
        role: str = "strong",
        storage: Storage | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        on_shard: Callable[[Progress], None] = lambda _: None,
        **sections: Any,
    ) -> tuple[pl.DataFrame, ScoringReport]:
        settings = self._settings_for(**sections)
        self.scored.clear()
        rows, report = score_pairs(
            Pairs.of(pairs),
            self.model(settings, role),
            storage or self.storage,
            settings.scoring,
            settings.runtime,
            on_progress=on_progress,
            on_shard=on_shard,
        )
        return tables.enforce(Logprobs, pl.concat(rows.parts())), report


class Wrapped:
    """Delegates to a scorer."""

    def __init__(self, scorer: SequenceScorer) -> None:
        self._scorer = scorer
        self.facts: ScorerFacts = scorer.facts

    def score(self, sequences: Sequence[TokenSequence]) -> Sequence[Sequence[Any]]:
        return self._scorer.score(sequences)


class Recorder(Wrapped):
    """Delegates to a scorer and records the batches."""

    def __init__(self, scorer: SequenceScorer, seen: list[list[TokenSequence]]) -> None:
        super().__init__(scorer)
        self._seen = seen

    def score(self, sequences: Sequence[TokenSequence]) -> Sequence[Sequence[Any]]:
        self._seen.append(list(sequences))
        return self._scorer.score(sequences)


@pytest.fixture
def new_storage(tmp_path: Path) -> Callable[[], Storage]:
    """Factory: an empty storage."""
    folders = iter(range(1000))
    return lambda: Storage(str(tmp_path / f"storage-{next(folders)}"), tmp_path / "locks")


@pytest.fixture
def scorings(settings_for: Callable[..., Settings], new_storage: Callable[[], Storage]) -> Scorings:
    return Scorings(settings_for, new_storage())


def means(frame: pl.DataFrame) -> pl.DataFrame:
    """Mean NLL of each quantity, by pair."""
    counts = {q: "num_q_tokens" if q in QUERY_SIDE else "num_a_tokens" for q in TEXTS}
    divided = (pl.col(f"sum_nll_{q}") / pl.col(count) for q, count in counts.items())
    return frame.select("pair_id", *divided, f"sum_nll_{Quantity.END}")


def assert_same_scores(one: pl.DataFrame, other: pl.DataFrame) -> None:
    assert_frame_equal(one.drop(SUMS), other.drop(SUMS))
    assert_frame_equal(means(one), means(other), abs_tol=RUN_TOLERANCE, rel_tol=0)


def naive_means(model: Any, pair: Pair, frame: str, prior: str) -> dict[Quantity, float]:
    q, a = text(pair.query), text(pair.answer)
    before = contexts(frame, prior, q, a)
    targets = {quantity: q if quantity in QUERY_SIDE else a for quantity in TEXTS}
    texts = {quantity: naive_nll(model, before[quantity], ids) / len(ids) for quantity, ids in targets.items()}
    return texts | {Quantity.END: naive_nll_of_any(model, before[Quantity.END], ENDS)}


# --- the naive reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_all_five_nlls_equal_the_naive_ones(
    frame: str,
    prior: str,
    scorings: Scorings,
    twenty_samples: list[Pair],
    tiny_model_dir: Callable[..., Path],
) -> None:
    pairs = twenty_samples[:12]
    framed = {"frame": frame, "system_prompt": SYSTEM}
    scored, report = scorings(pairs, strong=framed, scoring={"prior": prior}, runtime={"batch_tokens": 600})
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir()).eval()
    for pair, row in zip(pairs, means(scored).iter_rows(named=True), strict=True):
        for quantity, expected in naive_means(model, pair, frame, prior).items():
            assert row[f"sum_nll_{quantity}"] == pytest.approx(expected, abs=NAIVE_TOLERANCE), (pair.query, quantity)
    assert scored["num_q_tokens"].to_list() == [len(text(pair.query)) for pair in pairs]
    assert scored["num_a_tokens"].to_list() == [len(text(pair.answer)) for pair in pairs]
    assert len(scorings.scored) > 1, "more than one batch"
    assert report.num_scored_quantities == 5 * len(pairs)


@pytest.mark.parametrize("beginning", [[], [BOS, BOS]])
def test_the_comparison_would_notice_a_missing_or_a_second_bos(
    beginning: list[int], twenty_samples: list[Pair], tiny_model_dir: Callable[..., Path]
) -> None:
    """Even the smallest fault of a context, far from the scored tokens, exceeds the tolerance in some score by far."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir()).eval()
    for prior in ("null_answer", "user"):
        differences = []
        for pair in twenty_samples[:12]:
            q = text(pair.query)
            right = contexts("chat", prior, q, [])["q"]
            wrong = [*beginning, *right[1:]]
            differences.append(abs(naive_nll(model, right, q) - naive_nll(model, wrong, q)) / len(q))
        assert max(differences) > 100 * NAIVE_TOLERANCE


def test_the_two_models_give_their_own_scores(scorings: Scorings, twenty_samples: list[Pair]) -> None:
    strong, _ = scorings(twenty_samples, role="strong")
    weak, _ = scorings(twenty_samples, role="weak")
    assert scorings.num_loads == 2
    difference = means(strong).drop("pair_id") - means(weak).drop("pair_id")
    assert difference.select(pl.all().abs().min()).min_horizontal().item() > NAIVE_TOLERANCE


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(
    settings_for: Callable[..., Settings], new_storage: Callable[[], Storage], twenty_samples: list[Pair]
) -> pl.DataFrame:
    """The twenty samples, scored in one run and one shard."""
    frame, _ = Scorings(settings_for, new_storage())(twenty_samples, runtime={"shard_seconds": 1000})
    return frame


@pytest.mark.parametrize(
    "runtime",
    [
        {"batch_tokens": 16},
        {"batch_tokens": 700},
        {"batch_tokens": 1_000_000},
        {"batch_tokens": 16, "shard_seconds": 0},
        {"shard_seconds": 0},
    ],
    ids=str,
)
def test_neither_batches_nor_padding_nor_shards_move_a_score(
    runtime: dict[str, Any], scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    scored, report = scorings(twenty_samples, runtime=runtime)
    assert_same_scores(scored, reference)
    num_batches = len(scorings.scored)
    assert num_batches == {16: 80, 1_000_000: 1}.get(runtime.get("batch_tokens", 0), num_batches)
    assert report.runner == "packed"
    assert 0 < report.num_computed_tokens < report.num_tokens, "shared prefixes are computed once"


def test_the_order_of_the_pairs_moves_no_score(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    scored, _ = scorings(twenty_samples[::-1])
    assert_same_scores(scored, reference)


def test_the_company_of_other_pairs_moves_no_score(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    alone = [scorings([pair])[0] for pair in twenty_samples[:8]]
    assert_same_scores(pl.concat(alone), reference.head(8))


def test_a_template_that_writes_bos_itself_gives_the_same_scores(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    scored, _ = scorings(twenty_samples, tiny={"template": "emits_bos"})
    assert scorings.num_loads == 1
    assert_same_scores(scored, reference)


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids_at_once", [7, 1 << 20])
def test_a_second_run_scores_nothing_and_loads_no_model(
    ids_at_once: int, scorings: Scorings, twenty_samples: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "IDS_AT_ONCE", ids_at_once)
    first, first_report = scorings(twenty_samples)
    second, second_report = scorings(twenty_samples)
    assert scorings.num_loads == 1
    assert_frame_equal(second, first)
    assert (first_report.num_cached_quantities, first_report.num_scored_quantities) == (0, 100)
    assert (second_report.num_cached_quantities, second_report.num_scored_quantities) == (100, 0)
    assert second_report == replace(
        first_report,
        num_cached_quantities=100,
        num_scored_quantities=0,
        num_scored_pairs=0,
        num_sequences=0,
        num_tokens=0,
        num_targets=0,
        num_sums=0,
        num_computed_tokens=0,
        num_attended=0,
        seconds=0.0,
        runner=None,
        pool=None,
        devices=(),
        peak_share=None,
        estimate=None,
    )
    assert second_report.tokens_per_second is None


@pytest.mark.parametrize(
    ("num_tokens", "gigabytes", "device", "number"),
    [
        pytest.param(10_000, 0.27, "cpu", 1, id="a hundredth of a second"),
        pytest.param(60_000, 0.27, "cpu", 3, id="a minute of a small model"),
        pytest.param(200_000, 13.4, "cuda", 1, id="less than a large model takes to load"),
        pytest.param(100_000_000, 13.4, "cuda", 59, id="two hours of a large model"),
        pytest.param(0, 0.0, "mps", 1, id="nothing"),
    ],
)
def test_a_process_is_started_where_its_work_takes_much_longer_than_its_start(
    num_tokens: int, gigabytes: float, device: str, number: int
) -> None:
    assert justified_processes(num_tokens, int(gigabytes * 1e9), device) == number


def test_only_pairs_that_are_new_are_scored(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    scorings(twenty_samples[5:12])
    scored, report = scorings(twenty_samples)
    assert (report.num_cached_quantities, report.num_scored_quantities) == (35, 65)
    known = {pair.pair_id for pair in twenty_samples[5:12]}
    assert known.isdisjoint(sequence.pair_id for batch in scorings.scored for sequence in batch)
    assert_same_scores(scored, reference)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("first", ["rmi", "ifd", "end"])
def test_asked_for_one_score_first_and_then_for_all_only_the_rest_is_scored(
    first: str,
    prior: str,
    scorings: Scorings,
    new_storage: Callable[[], Storage],
    twenty_samples: list[Pair],
) -> None:
    selections = [{"name": "any", "strategy": "length"}]
    part, part_report = scorings(twenty_samples, scoring={"quantities": [first], "prior": prior}, selections=selections)
    rest = set(Quantity).difference(QUANTITIES_OF[first])
    for quantity in rest:
        assert part[f"null_reason_{quantity}"].unique().to_list() == [NullReason.NOT_WANTED.value]
    whole, report = scorings(twenty_samples, scoring={"prior": prior})
    done = 20 * len(QUANTITIES_OF[first])
    assert (part_report.num_scored_quantities, part_report.num_sequences) == (done, done)
    assert (report.num_cached_quantities, report.num_scored_quantities) == (done, 100 - done)
    shares_a_sequence = prior == "user" and first == "end"  # Q is scored where A | Q is.
    num_sequences = {"rmi": 60, "ifd": 40, "end": 60 if shares_a_sequence else 80}
    assert report.num_sequences == num_sequences[first]
    asked = {target.quantity for batch in scorings.scored for one in batch for target in one.targets}
    assert asked == rest
    at_once, _ = scorings(twenty_samples, scoring={"prior": prior}, storage=new_storage())
    assert_same_scores(whole, at_once)


def test_rmi_cached_without_the_end_costs_one_short_sequence_a_pair(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    _, before = scorings(twenty_samples, scoring={"quantities": ["rmi"]})
    scored, report = scorings(twenty_samples, scoring={"quantities": ["rmi", "end"]})
    assert (report.num_cached_quantities, report.num_scored_quantities, report.num_sequences) == (40, 20, 20)
    assert report.num_tokens < before.num_tokens / 2
    assert_frame_equal(
        scored.select("sum_nll_q", "sum_nll_q_given_a", "sum_nll_end"),
        reference.select("sum_nll_q", "sum_nll_q_given_a", "sum_nll_end"),
        abs_tol=20 * RUN_TOLERANCE,
        rel_tol=0,
    )


def test_other_end_tokens_score_the_end_again_and_nothing_else(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a release knows another name of an end token: the model and its identity are the same."""
    monkeypatch.setattr("qaq_pipeline.lm.tokenizer._END_OF_TEXT", ("</s>",))
    fewer, report = scorings(twenty_samples)
    assert report.num_scored_quantities == 100
    monkeypatch.undo()
    scored, report = scorings(twenty_samples)
    assert (report.num_cached_quantities, report.num_scored_quantities, report.num_sequences) == (80, 20, 20)
    assert_same_scores(scored, reference)
    assert (fewer["sum_nll_end"] > scored["sum_nll_end"]).all(), "more tokens, more probability"
    _, report = scorings(twenty_samples)
    assert report.num_scored_quantities == 0


class KilledError(Exception):
    """Simulates a run that ends in the middle."""


class Killed(Wrapped):
    """A scorer that ends the run at its nth batch."""

    def __init__(self, scorer: SequenceScorer, at_batch: int) -> None:
        super().__init__(scorer)
        self._batches_left = at_batch

    def score(self, sequences: Sequence[TokenSequence]) -> Sequence[Sequence[Any]]:
        self._batches_left -= 1
        if self._batches_left < 0:
            raise KilledError
        return self._scorer.score(sequences)


@pytest.mark.parametrize("at_batch", [0, 1, 7])
def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_scores(
    at_batch: int, scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    runtime = {"batch_tokens": 400, "shard_seconds": 0}
    scorings.wrap = lambda scorer: Killed(scorer, at_batch)
    with pytest.raises(KilledError):
        scorings(twenty_samples, runtime=runtime)
    done = sum(len(sequence.targets) for batch in scorings.scored[:at_batch] for sequence in batch)
    scorings.wrap = lambda scorer: scorer
    scored, report = scorings(twenty_samples, runtime=runtime)
    assert (report.num_cached_quantities, report.num_scored_quantities) == (done, 100 - done)
    assert_same_scores(scored, reference)


@pytest.mark.parametrize("end", [KilledError, KeyboardInterrupt, SystemExit])
def test_a_run_that_ends_by_an_error_or_a_signal_loses_nothing_that_was_finished(
    end: type[BaseException], scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    runtime = {"batch_tokens": 400, "shard_seconds": 1000}

    def stop(progress: Progress) -> None:
        if len(scorings.scored) == 7:
            raise end

    with pytest.raises(end):
        scorings(twenty_samples, runtime=runtime, on_progress=stop)
    done = sum(len(sequence.targets) for batch in scorings.scored for sequence in batch)
    scored, report = scorings(twenty_samples, runtime=runtime)
    assert (report.num_cached_quantities, report.num_scored_quantities) == (done, 100 - done)
    assert_same_scores(scored, reference)


def test_whatever_makes_another_score_is_scored_again(scorings: Scorings, twenty_samples: list[Pair]) -> None:
    pairs = twenty_samples[:2]
    changes: list[dict[str, Any]] = [
        {},
        {"tiny": {"seed": 5}},
        {"tiny": {"template": "trims"}},
        {"strong": {"frame": "plain"}},
        {"strong": {"system_prompt": "Other."}},
        {"strong": {"dtype": "bfloat16"}},
        {"scoring": {"prior": "user"}},
        {"scoring": {"invalid_clause": False}},
        {"scoring": {"max_tokens": 500}},
        {"scoring": {"too_long": "leave_unscored"}},
    ]
    for number, change in enumerate(changes, start=1):
        _, report = scorings(pairs, **change)
        # A change that affects no prompt (a template that trims) still changes the hash of the files.
        assert (scorings.num_loads, report.num_cached_quantities) == (number, 0), change
    for change in changes:
        scorings(pairs, **change)
    assert scorings.num_loads == len(changes)


def test_a_cached_sum_over_another_number_of_tokens_is_scored_again(
    settings_for: Callable[..., Settings], scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    stale = {"quantity": "q", "sum_nll": 1e-6, "num_tokens": 999, "end_ids": "", "null_reason": None}
    rows = [stale | {"pair_id": pair.pair_id} for pair in twenty_samples[:3]]
    identity = scorings.model(settings_for()).identity
    scorings.storage.scores.append(
        identity, pl.DataFrame(rows, schema=tables.dtypes(tables.CachedScores)), {"libraries": {}, "device": "cpu"}
    )
    scored, report = scorings(twenty_samples)
    assert report.num_cached_quantities == 0
    assert_same_scores(scored, reference)


def test_what_only_changes_time_rescores_nothing(scorings: Scorings, twenty_samples: list[Pair]) -> None:
    scorings(twenty_samples[:4])
    scorings(twenty_samples[:4], runtime={"batch_tokens": 64, "shard_seconds": 0}, strong={"device": "auto"})
    assert scorings.num_loads == 1


# --- what cannot be scored -------------------------------------------------------------------------------------------


def test_what_is_not_scorable_is_null_with_its_reason_and_counted(scorings: Scorings) -> None:
    texts = {
        "fine": ("Reverse s.", "s[::-1]"),
        "no_query": ("", "answer"),
        "no_answer": ("query", ""),
        "long_query": ("q" * 600, "answer"),
        "long_answer": ("query", "a" * 600),
    }
    pairs = [Pair(f"{number:032x}", None, *values) for number, values in enumerate(texts.values())]
    for too_long, last in (("truncate_answer", None), ("leave_unscored", NullReason.PAIR_TOO_LONG)):
        scored, report = scorings(pairs, scoring={"too_long": too_long})
        expected = [None, NullReason.NO_TOKENS_TO_SCORE, NullReason.NO_TOKENS_TO_SCORE, NullReason.QUERY_TOO_LONG, last]
        reasons: dict[Quantity, list[NullReason | None]] = dict.fromkeys(Quantity, expected)
        if last is None:
            reasons[Quantity.END] = [*expected[:-1], NullReason.ANSWER_TRUNCATED]
        for quantity, of_quantity in reasons.items():
            assert scored[f"null_reason_{quantity}"].to_list() == of_quantity
            is_null = [reason is not None for reason in of_quantity]
            assert scored[f"sum_nll_{quantity}"].is_null().to_list() == is_null
        assert report.num_pairs == scored.height == len(pairs)
        assert scored["is_truncated"].to_list() == [False, False, False, False, last is None]
        assert scored["num_a_tokens_untruncated"].to_list() == [7, 6, 0, 6, 600]


def test_without_end_tokens_the_end_is_null_with_a_reason_and_nothing_else_is(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairEncoder, "end_ids", lambda *_: ())
    scored, report = scorings(twenty_samples)
    assert scored["null_reason_end"].unique().to_list() == [NullReason.NO_END_TOKEN]
    assert scored["sum_nll_end"].null_count() == 20
    assert report.num_scored_quantities == 80
    without = ("sum_nll_end", "null_reason_end")
    sums = [name for name in SUMS if name not in without]
    assert_frame_equal(scored.drop(*without, *sums), reference.drop(*without, *sums))
    assert_frame_equal(scored.select(sums), reference.select(sums), abs_tol=100 * RUN_TOLERANCE, rel_tol=0)


def test_where_nothing_is_scorable_no_model_is_loaded(scorings: Scorings) -> None:
    scored, report = scorings([Pair("0" * 32, None, "q" * 600, "a"), Pair("1" * 32, None, "", "a")])
    assert scorings.num_loads == 0
    assert scored["null_reason_q"].to_list() == [NullReason.QUERY_TOO_LONG, NullReason.NO_TOKENS_TO_SCORE]
    assert report.num_sequences == 0


def test_no_pairs_make_an_empty_table(scorings: Scorings) -> None:
    scored, report = scorings([])
    assert scored.height == report.num_pairs == scorings.num_loads == 0


class Spoiling(Wrapped):
    """A scorer that replaces a log-probability of one quantity of one pair."""

    def __init__(self, scorer: SequenceScorer, pair_id: str, quantity: Quantity, value: float) -> None:
        super().__init__(scorer)
        self._place = (pair_id, quantity)
        self._value = value

    def score(self, sequences: Sequence[TokenSequence]) -> Sequence[Sequence[Any]]:
        scored = [[value.copy() for value in values] for values in self._scorer.score(sequences)]
        for sequence, values in zip(sequences, scored, strict=True):
            for target, of_target in zip(sequence.targets, values, strict=True):
                if (sequence.pair_id, target.quantity) == self._place:
                    of_target[0] = self._value
        return scored


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantity", [Quantity.Q_GIVEN_A, Quantity.A, Quantity.END])
def test_fault_5_a_score_that_is_not_finite_is_null_with_a_reason_and_harms_no_other(
    value: float, quantity: Quantity, scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    spoiled = twenty_samples[3].pair_id
    scorings.wrap = lambda scorer: Spoiling(scorer, spoiled, quantity, value)
    scored, _ = scorings(twenty_samples)
    row = scored.row(3, named=True)
    assert row["pair_id"] == spoiled
    assert (row[f"sum_nll_{quantity}"], row[f"null_reason_{quantity}"]) == (None, NullReason.NON_FINITE)
    reasons = scored.select(f"null_reason_{q}" for q in Quantity)
    assert reasons.null_count().sum_horizontal().item() == 5 * 20 - 1
    others = pl.col("pair_id") != spoiled
    assert_frame_equal(means(scored).filter(others), means(reference).filter(others), abs_tol=RUN_TOLERANCE, rel_tol=0)

    again, report = scorings(twenty_samples)
    assert_frame_equal(again, scored)
    assert (report.num_cached_quantities, report.num_scored_quantities) == (99, 1), "a failure is not cached"
    scorings.wrap = lambda scorer: scorer
    repaired, _ = scorings(twenty_samples)
    assert_frame_equal(means(repaired), means(reference), abs_tol=RUN_TOLERANCE, rel_tol=0)


def test_fault_6_every_pair_asked_for_is_in_the_table_once_whatever_became_of_it(
    scorings: Scorings, twenty_samples: list[Pair]
) -> None:
    """Every input pair is an output row: none is dropped silently, and no number represents a failure."""
    pairs = [*twenty_samples, Pair("f" * 32, None, "", ""), Pair("e" * 32, None, "q" * 9999, "a")]
    scored, report = scorings(pairs, scoring={"max_tokens": 300})
    assert scored["pair_id"].to_list() == sorted(pair.pair_id for pair in pairs)
    assert report.num_pairs == len(pairs)
    for quantity in Quantity:
        sums, reasons = scored[f"sum_nll_{quantity}"], scored[f"null_reason_{quantity}"]
        assert (sums.is_null() == reasons.is_not_null()).all()
        assert (sums.drop_nulls() > 0).all()
    assert scored["null_reason_q"].drop_nulls().to_list()[-2:] == ["query_too_long", "no_tokens_to_score"]
    assert scored["is_truncated"].any()


class Cramped(Wrapped):
    """A scorer that fits `room` tokens at once."""

    def __init__(self, scorer: SequenceScorer, room: int) -> None:
        super().__init__(scorer)
        self._room = room

    def score(self, sequences: Sequence[TokenSequence]) -> Sequence[Sequence[Any]]:
        if sum(len(sequence.token_ids) for sequence in sequences) > self._room:
            raise BatchTooLargeError
        return self._scorer.score(sequences)


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_no_score_moves(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    scorings.wrap = lambda scorer: Cramped(scorer, room=700)
    scored, report = scorings(twenty_samples, runtime={"batch_tokens": 5000})
    assert report.num_splits > 3
    assert report.num_scored_quantities == 100
    assert_same_scores(scored, reference)


def test_a_sequence_that_fits_nowhere_is_null_with_its_reason_and_is_tried_again_by_the_next_run(
    scorings: Scorings, twenty_samples: list[Pair], reference: pl.DataFrame
) -> None:
    scorings(twenty_samples)
    longest = max(len(one.token_ids) for batch in scorings.scored for one in batch)
    too_long = {one.pair_id for batch in scorings.scored for one in batch if len(one.token_ids) == longest}
    elsewhere = Storage(scorings.storage.files.path("elsewhere"), Path(scorings.storage.files.path("locks")))
    scorings.wrap = lambda scorer: Cramped(scorer, room=longest - 1)
    scored, _ = scorings(twenty_samples, storage=elsewhere)
    reasons = scored.unpivot([f"null_reason_{q}" for q in Quantity], index="pair_id").drop_nulls()
    assert set(reasons["pair_id"]) == too_long
    assert set(reasons["value"]) == {NullReason.OUT_OF_MEMORY.value}
    scorings.wrap = lambda scorer: scorer
    repaired, report = scorings(twenty_samples, storage=elsewhere)
    assert report.num_scored_quantities == reasons.height
    assert_same_scores(repaired, reference)


def test_an_error_of_the_model_ends_the_run_and_becomes_no_score(
    scorings: Scorings, twenty_samples: list[Pair]
) -> None:
    class Failing(Wrapped):
        def score(self, sequences: Sequence[TokenSequence]) -> Sequence[Sequence[Any]]:
            raise RuntimeError("out of order")

    scorings.wrap = Failing
    with pytest.raises(RuntimeError, match="out of order"):
        scorings(twenty_samples)
    scorings.wrap = lambda scorer: scorer
    _, report = scorings(twenty_samples)
    assert report.num_cached_quantities == 0


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_counts_real_tokens_up_to_all_of_them(scorings: Scorings, twenty_samples: list[Pair]) -> None:
    steps: list[Progress] = []
    shards: list[Progress] = []
    _, report = scorings(
        twenty_samples,
        runtime={"batch_tokens": 600, "shard_seconds": 0},
        on_progress=steps.append,
        on_shard=shards.append,
    )
    assert shards == [*steps, steps[-1]]
    assert len(steps) == len(scorings.scored) > 3
    assert [step.done_sequences for step in steps] == sorted(step.done_sequences for step in steps)
    assert {step.total_tokens for step in steps} == {report.num_tokens}
    last = steps[-1]
    assert (last.done_tokens, last.done_sequences) == (last.total_tokens, last.total_sequences)
    assert last.seconds_left == 0
    assert report.seconds == last.seconds
    assert report.num_tokens == sum(len(one.token_ids) for batch in scorings.scored for one in batch)
    computed = [[len(one.token_ids) - one.num_shared for one in batch] for batch in scorings.scored]
    assert report.num_computed_tokens == sum(map(sum, computed))
    assert report.peak_share is not None
    assert 0 < report.peak_share < 1
    longest = [max(lengths) for lengths in computed]
    assert longest == sorted(longest, reverse=True)


def test_progress_before_any_time_has_passed_knows_no_rate() -> None:
    progress = Progress("strong", 0, 10, 0, 1, seconds=0.0)
    assert math.isnan(progress.tokens_per_second)
    assert math.isnan(progress.seconds_left)


@pytest.mark.parametrize(
    ("quantities", "wanted"),
    [
        (["rmi"], {Quantity.Q, Quantity.Q_GIVEN_A}),
        (["ifd"], {Quantity.A, Quantity.A_GIVEN_Q}),
        (["end"], {Quantity.END}),
        (["rmi", "ifd"], set(TEXTS)),
        (["rmi", "ifd", "end"], set(Quantity)),
    ],
)
def test_the_wanted_scores_name_their_quantities(quantities: list[str], wanted: set[Quantity]) -> None:
    assert wanted_quantities(ScoringSettings.model_validate({"quantities": quantities})) == wanted


def test_a_small_model_reaches_a_smaller_share_of_a_gpus_peak_than_a_large_one() -> None:
    small, middle, large = (typical_share("cuda:0 (NVIDIA H100)", 2 * size) for size in (0.6e9, 2e9, 6.5e9))
    assert (small, large) == (0.35, 0.65)
    assert small < middle < large
    assert typical_share("cuda:0", 1e3) == small
    assert typical_share("cuda:0", 1e15) == large
    assert typical_share("cpu", 1.2e9) == TYPICAL_SHARE


def test_an_estimate_counts_the_attention_of_the_tokens_that_are_computed() -> None:
    class Forecast:
        num_sequences = expected_sequences = 1
        expected_tokens, expected_shared_tokens, expected_targets = 100, 40, 10
        expected_attended, expected_shared_attended = 5050, 820

    plan: Any = Forecast()
    facts = ScorerFacts(
        "r", is_padded=True, shares_prefixes=False, batch_tokens=1, flops_per_token=7, flops_per_target=3
    )
    facts = replace(facts, flops_per_attended=2, peak_flops_per_second=1000)
    assert Estimate.of(plan, [facts]).flops == 100 * 7 + 10 * 3 + 5050 * 2
    shared = Estimate.of(plan, [replace(facts, shares_prefixes=True)])
    assert shared.flops == 60 * 7 + 10 * 3 + (5050 - 820) * 2
    assert shared.seconds == shared.flops / (TYPICAL_SHARE * 1000)
    on_gpu = Estimate.of(plan, [replace(facts, shares_prefixes=True, device="cuda:0")] * 2)
    assert on_gpu.seconds == shared.flops / (typical_share("cuda", 7) * 2000)
    unknown = Estimate.of(plan, [replace(facts, flops_per_token=0)])
    assert (unknown.flops, math.isnan(unknown.seconds)) == (0, True)
