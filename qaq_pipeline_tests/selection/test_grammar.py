"""grammar: conditions, caps and quotas of every strategy, against a naive selection by loops."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import TypeAdapter

from qaq_pipeline.config.conditions import Condition
from qaq_pipeline.config.selections import RmiBandSelection, Selection
from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.ingest.imported_tables import ImportedTable
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.grammar.composition import meets
from qaq_pipeline.selection.grammar.pair_columns import CLUSTER, QUERY, count_unmatched, with_pair_columns
from qaq_pipeline.selection.grammar.quotas import spread
from qaq_pipeline.selection.strategies import model_of, select, select_all
from qaq_pipeline_tests.selection.test_strategies import STRATEGIES, candidates_of, parse, reasons, scores_of
from qaq_pipeline_tests.support.decided import kept_rows
from qaq_pipeline_tests.support.frames import ONE_STRATUM, pair_name, raw_rows, rejected, rmi_rows

VALUES = ["python", "go", "rust", None]
SHARES = ["equal", "proportional", {"python": 0.5, "none": 0.25}, {"go": 1.0}, {"go": 0.3, "rust": 0.7}]
BUDGETS = [{"fraction": 0.25}, {"fraction": 0.8}, {"count": 7}, {"answer_tokens": 300}]
CONDITIONS = [
    [],
    [{"column": "language", "one_of": ["python", "go"]}],
    [{"column": "language", "is_present": True}, {"column": "judge.score", "at_least": 3}],
    [{"column": "judge.score", "is_present": False}],
]


# --- the naive selection


def naive(rows: list[dict[str, Any]], selection: Selection) -> dict[str, str]:
    """The reason of every pair, from the verdict of the strategy alone on it, by loops.

    Args:
        rows: of one pair each: its columns, and `plain`, its verdict where all pairs without a filter are taken.
        selection: with conditions, a cap and quotas.
    """
    found, open_rows, per_query, per_cluster = {}, [], Counter[int](), Counter[str]()
    in_pool = [row for row in rows if row["plain"]["reason"] != "not_in_pool"]
    for row in sorted(rows, key=lambda row: row["plain"]["position"] or 0):
        if row["plain"]["reason"] == "not_in_pool":
            found[row["pair_id"]] = "not_in_pool"
        elif not all(naive_meets(row, condition) for condition in selection.where):
            found[row["pair_id"]] = "where_not_met"
        elif row["plain"]["position"] is None:
            found[row["pair_id"]] = row["plain"]["reason"]
        elif selection.max_per_query is not None and per_query[row[QUERY]] == selection.max_per_query:
            found[row["pair_id"]] = "query_full"
        else:
            per_query[row[QUERY]] += 1
            per_cluster[row[CLUSTER]] += 1
            if selection.max_per_cluster is not None and per_cluster[row[CLUSTER]] > selection.max_per_cluster:
                found[row["pair_id"]] = "cluster_full"
            else:
                open_rows.append(row)
    quotas = naive_quotas(in_pool, open_rows, selection)
    used: Counter[str | None] = Counter()
    full = set()
    for row in open_rows:
        group = group_in(row, selection)
        used[group] += size_of(row, selection)
        if used[group] > quotas.get(group, -1):
            full.add(group)
        taken = "in_band" if isinstance(selection, RmiBandSelection) else "within_budget"
        beyond = "below_cut" if selection.quotas is None else "quota_full"
        found[row["pair_id"]] = beyond if group in full else taken
    return found


def naive_meets(row: dict[str, Any], condition: Condition) -> bool:
    value = row[f"column:{condition.column}"]
    if condition.is_present is not None:
        return (value is not None) == condition.is_present
    if value is None:
        return False
    if condition.at_least is not None:
        return float(value) >= condition.at_least
    return value in (condition.one_of or ())


def group_in(row: dict[str, Any], selection: Selection) -> str | None:
    return None if selection.quotas is None else row[f"column:{selection.quotas.per}"] or "none"


def size_of(row: dict[str, Any], selection: Selection) -> int:
    is_of_tokens = not isinstance(selection, RmiBandSelection) and selection.budget.answer_tokens is not None
    return row["answer_tokens"] if is_of_tokens else 1


def naive_quotas(
    in_pool: list[dict[str, Any]], open_rows: list[dict[str, Any]], selection: Selection
) -> dict[str | None, int]:
    capacity: Counter[str | None] = Counter()
    for row in open_rows:
        capacity[group_in(row, selection)] += size_of(row, selection)
    if isinstance(selection, RmiBandSelection):
        total = sum(capacity.values())
    elif selection.budget.fraction is not None:
        total = math.floor(Fraction(str(selection.budget.fraction)) * len(in_pool) + Fraction(1, 2))
    else:
        total = selection.budget.count or selection.budget.answer_tokens or 0
    if selection.quotas is None:
        return {None: total}
    shares = selection.quotas.shares
    if isinstance(shares, dict):
        return {group: math.floor(Fraction(str(share)) * total) for group, share in shares.items()}
    if shares == "equal":
        return {**naive_spread({str(group): size for group, size in capacity.items()}, total)}
    pooled: Counter[str | None] = Counter()
    for row in in_pool:
        pooled[group_in(row, selection)] += size_of(row, selection)
    n = sum(pooled.values())
    given = {group: total * size // n for group, size in pooled.items()}
    order = sorted(pooled, key=lambda group: (-(total * pooled[group] % n), str(group)))
    for group in order[: total - sum(given.values())]:
        given[group] += 1
    return given


def naive_spread(capacities: dict[str, int], total: int) -> dict[str, int]:
    """One at a time, to each group in turn that has room, and the odd ones to the first by name."""
    given = dict.fromkeys(capacities, 0)
    while total:
        room = [group for group in sorted(capacities) if given[group] < capacities[group]][:total]
        if not room:
            break
        for group in room:
            given[group] += 1
            total -= 1
    return given


def columns_of(size: int, seed: int) -> pl.DataFrame:
    """A language, a judge's score, a query and a cluster for each pair, the first two for some only."""
    numbers = range(size)
    return pl.DataFrame(
        {
            "pair_id": [f"{number:032x}" for number in numbers],
            "column:language": [VALUES[(seed + number * number) % 4] for number in numbers],
            "column:judge.score": [str((seed + number) % 6) if (seed + number) % 7 else None for number in numbers],
            QUERY: [(seed + number) % max(1, size // 2) for number in numbers],
            CLUSTER: [f"b1/a.jsonl:{(seed + number) % max(1, size // 4) + 1}.0" for number in numbers],
        },
        schema={
            "pair_id": pl.String,
            "column:language": pl.String,
            "column:judge.score": pl.String,
            QUERY: pl.Int64,
            CLUSTER: pl.String,
        },
    )


def composed(strategy: dict[str, Any], **grammar: Any) -> Selection:
    return parse(**strategy, **grammar)


GRAMMAR = st.fixed_dictionaries(
    {
        "where": st.sampled_from(CONDITIONS),
        "max_per_query": st.sampled_from([None, 1, 2]),
        "max_per_cluster": st.sampled_from([None, 1, 3]),
        "quotas": st.sampled_from([None, *({"per": "language", "shares": shares} for shares in SHARES)]),
    }
)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: one["strategy"])
@effort(max_examples=25)
@given(size=st.integers(0, 40), seed=st.integers(0, 999), grammar=GRAMMAR, budget=st.sampled_from(BUDGETS))
def test_the_selection_equals_the_naive_one(
    strategy: dict[str, Any], size: int, seed: int, grammar: dict[str, Any], budget: dict[str, Any]
) -> None:
    sized = {} if strategy["strategy"] == "rmi_band" else {"budget": budget}
    selection = composed(strategy | sized, **grammar)
    frame = candidates_of(scores_of(size, seed)).join(columns_of(size, seed), on="pair_id", maintain_order="left")
    if strategy["strategy"] == "stratified_random":  # Its places depend on which pairs meet the conditions.
        grammar["where"], selection = [], composed(strategy | sized, **grammar | {"where": []})
    every = selection.without_conditions
    if not isinstance(every, RmiBandSelection) and strategy["strategy"] != "stratified_random":
        every = every.model_copy(update={"budget": every.budget.model_copy(update={"fraction": 1.0, "count": None})})
    plain = {row["pair_id"]: row for row in select(frame, every).iter_rows(named=True)}
    of_model = frame.filter(pl.col("model") == model_of(selection))
    rows = [row | {"plain": plain[row["pair_id"]]} for row in of_model.iter_rows(named=True)]
    verdicts = select(frame, selection)
    assert reasons(verdicts) == naive(rows, selection)
    for row in verdicts.iter_rows(named=True):
        assert row["is_selected"] == (row["reason"] in ("within_budget", "in_band"))
        has_barrier = row["reason"] in ("not_in_pool", "where_not_met") or plain[row["pair_id"]]["position"] is None
        assert (row["position"] is None) == has_barrier
    placed = verdicts.drop_nulls("position").sort("position")
    assert placed["position"].to_list() == list(range(1, placed.height + 1))
    assert set(verdicts["pool_size"]) <= {sum(one["reason"] != "not_in_pool" for one in plain.values())}


@given(
    capacities=st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.integers(1, 40)),
    total=st.integers(0, 200),
)
def test_equal_shares_are_filled_like_water(capacities: dict[str, int], total: int) -> None:
    found = {group: size for group, size in spread(capacities, total).items() if size}
    assert found == {group: size for group, size in naive_spread(capacities, total).items() if size}
    assert sum(found.values()) == min(total, sum(capacities.values()))


def test_the_order_of_the_rows_does_not_matter() -> None:
    quotas = {"per": "language", "shares": "equal"}
    grammar = {"where": CONDITIONS[1], "max_per_query": 1, "max_per_cluster": 1, "quotas": quotas}
    selections = [composed(one | {"name": f"s{i}"}, **grammar) for i, one in enumerate(STRATEGIES)]
    frame = candidates_of(scores_of(60, 3)).join(columns_of(60, 3), on="pair_id", maintain_order="left")
    shuffled = frame.sample(fraction=1, shuffle=True, seed=2)
    assert_frame_equal(select_all(shuffled, selections), select_all(frame, selections))


# --- controls and the reference


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: one["strategy"])
@pytest.mark.parametrize("shares", [None, *SHARES], ids=str)
@pytest.mark.parametrize("budget", [{"fraction": 0.3}, {"answer_tokens": 900}], ids=str)
def test_controls_have_the_conditions_the_cap_and_the_groups_of_the_published_selection(
    strategy: dict[str, Any], shares: Any, budget: dict[str, Any]
) -> None:
    columns = columns_of(120, 1)
    frame = candidates_of(scores_of(120, 1)).join(columns, on="pair_id", maintain_order="left")
    sized = {} if strategy["strategy"] == "rmi_band" else {"budget": budget}
    quotas = None if shares is None else {"per": "language", "shares": shares}
    published = composed(strategy | sized, where=CONDITIONS[1], max_per_query=1, max_per_cluster=1, quotas=quotas)
    first, *controls = select_all(frame, [published]).partition_by("selection", maintain_order=True)
    groups = dict(columns.select("pair_id", "column:language").iter_rows())
    capped = [dict(columns.select("pair_id", name).iter_rows()) for name in (QUERY, CLUSTER)]
    taken = first.filter("is_selected")["pair_id"]
    is_of_tokens = "answer_tokens" in sized.get("budget", {})
    for control in controls:
        of_control = control.filter("is_selected")["pair_id"]
        pool, published_pool = (one.filter(pl.col("reason") != "not_in_pool")["pair_id"] for one in (control, first))
        assert pool.equals(published_pool)
        not_met = [one.filter(reason="where_not_met")["pair_id"].to_list() for one in (control, first)]
        assert not_met[0] == not_met[1]
        assert {groups[pair] for pair in of_control} <= {"python", "go"}
        for value_of in capped:
            assert max(Counter(value_of[pair] for pair in of_control).values(), default=0) <= 1
        if not is_of_tokens:
            assert len(of_control) == len(taken)
            if quotas is not None:
                assert Counter(groups[pair] for pair in of_control) == Counter(groups[pair] for pair in taken)
        elif quotas is not None:
            assert {groups[pair] for pair in of_control} <= {groups[pair] for pair in taken}


def test_conditions_and_caps_of_a_reference_hold_for_the_batch_only() -> None:
    reference = candidates_of(scores_of(80, 5))
    batch = reference.join(columns_of(80, 5), on="pair_id", maintain_order="left")
    plain = parse(strategy="diff_high", budget={"fraction": 0.5})
    selection = parse(
        strategy="diff_high", budget={"fraction": 0.5}, where=CONDITIONS[1], max_per_query=1, max_per_cluster=1
    )
    expected, found = select(batch, plain, reference), select(batch, selection, reference)
    taken = set(found.filter("is_selected")["pair_id"])
    assert taken < set(expected.filter("is_selected")["pair_id"])
    excluded = {"not_in_pool", "where_not_met", "query_full", "cluster_full"}
    assert set(found["reason"]) == excluded | {"within_budget", "below_cut"}
    assert found.drop_nulls("cut")["cut"].unique().to_list() == expected.drop_nulls("cut")["cut"].unique().to_list()
    below = found.filter(pl.col("reason").is_in(["within_budget", "below_cut"])).join(expected, on="pair_id")
    assert below["reason"].equals(below["reason_right"].alias("reason"))


# --- conditions


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        ({"equals": "python"}, ["python"]),
        ({"equals": 7}, ["7", "7.0", "7e0"]),
        ({"equals": "7"}, ["7"]),
        ({"equals": True}, ["true", "True"]),
        ({"equals": "true"}, ["true"]),
        ({"one_of": ["python", 8, False]}, ["python", "8.5e-1e", "false"][::2]),
        ({"at_least": 7}, ["7", "7.0", "7e0", "inf"]),
        ({"at_most": 7}, ["7", "7.0", "7e0", "-3"]),
        ({"is_present": False}, [None]),
    ],
)
def test_a_condition_is_met_by_these_values(condition: dict[str, Any], met: list[str | None]) -> None:
    values = ["python", "Python", "7", "7.0", "7e0", "-3", "inf", "nan", "8.5e-1e", "true", "True", "false", "", None]
    frame = pl.DataFrame({"column:source": values}, schema={"column:source": pl.String})
    one = Condition.model_validate({"column": "source"} | condition)
    assert frame.filter(meets(one))["column:source"].to_list() == met


def test_a_pair_with_a_value_is_met_by_is_present() -> None:
    frame = pl.DataFrame({"column:source": ["", "x", None]})
    one = Condition.model_validate({"column": "source", "is_present": True})
    assert frame.filter(meets(one))["column:source"].to_list() == ["", "x"]


# --- the columns of pairs


RAW = raw_rows(
    {"language": "go", "record": '{"tests": {"passed": 3}, "ok": true, "score": 7.5, "a b": "x", "none": null}'},
    {"language": "c", "pair_id": pair_name(1), "record": '{"score": 1}'},
    rejected(),
    {"query": "query  1", "source": "forum", "record": '{"ok": "yes"}'},
    {},
)
NAMED = {
    "language": "go",
    "source": None,
    "record.score": "7.5",
    "record.ok": "true",
    "record.a b": "x",
    "record.none": None,
    "record.absent": None,
    "record.tests": '{"passed":3}',
    "num_q_tokens": "7",
    "num_a_tokens": "11",
    "judge.score": "9",
    "runs.passed": "yes",
}


def imported(key: str, **rows: str) -> ImportedTable:
    columns = {"pair_id": "score", "row": "passed"}
    frame = pl.DataFrame({"key": list(rows.keys()), columns[key]: list(rows.values())}, schema_overrides={})
    return ImportedTable(key, "0", frame)


def test_a_pair_has_the_columns_of_the_row_that_is_kept_and_of_the_imported_tables() -> None:
    screened = screen_alone(RAW, ScreeningSettings())
    scores = {role: rmi_rows(*({"pair_id": pair_name(n)} for n in (1, 4, 5))) for role in ("strong", "weak")}
    pairs = candidates(disagreement_scores(scores, ONE_STRATUM, "batch:b1")[0], scores)
    tables = {
        "judge": imported("pair_id", **{pair_name(1): "9", pair_name(7): "2"}),
        "runs": imported("row", **{"b1/a.jsonl:1.0": "yes", "b1/a.jsonl:2.0": "no", "b0/a.jsonl:4.0": "no"}),
    }
    conditions = [{"column": name, "is_present": True} for name in NAMED]
    selection = TypeAdapter(Selection).validate_python(
        {"name": "mine", "strategy": "length", "where": conditions, "max_per_query": 1, "max_per_cluster": 1}
    )
    frame = with_pair_columns(pairs, kept_rows(RAW, screened), [selection], tables)
    assert frame.select(pairs.columns).equals(pairs)
    for row in frame.filter(pair_id=pair_name(1)).iter_rows(named=True):
        assert {name: row[f"column:{name}"] for name in NAMED} == NAMED
    other = frame.filter(pair_id=pair_name(4)).row(0, named=True)
    assert (other["column:judge.score"], other["column:record.ok"], other["column:source"]) == (None, "yes", "forum")
    queries = dict(frame.select("pair_id", QUERY).iter_rows())
    assert queries[pair_name(1)] == queries[pair_name(4)] != queries[pair_name(5)]
    clusters = dict(frame.select("pair_id", CLUSTER).iter_rows())
    assert clusters[pair_name(1)] == clusters[pair_name(4)] == "b1/a.jsonl:1.0" != clusters[pair_name(5)]
    assert [count_unmatched(RAW, screened, table) for table in tables.values()] == [1, 2]


def test_a_batch_without_pairs_has_the_named_columns() -> None:
    raw, tables = raw_rows(rejected()), {"judge": imported("pair_id", **{pair_name(1): "9"})}
    condition = {"column": "judge.score", "at_least": 7}
    selection = parse(
        strategy="diff_high", where=[condition], max_per_query=1, quotas={"per": "source", "shares": "equal"}
    )
    pairs = candidates_of(scores_of(0, 1))
    frame = with_pair_columns(pairs, kept_rows(raw, screen_alone(raw, ScreeningSettings())), [selection], tables)
    assert {"column:judge.score", "column:source", QUERY} <= set(frame.columns)
    assert select_all(frame, [selection]).is_empty()


def test_candidates_without_named_columns_stay_as_they_are() -> None:
    frame = candidates_of(scores_of(3, 1))
    assert with_pair_columns(frame, [RAW], [parse(strategy="length")], {}) is frame
