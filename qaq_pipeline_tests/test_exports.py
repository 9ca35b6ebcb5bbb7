"""exports: what a trainer loads, to the byte, and the flat table of scores."""

from __future__ import annotations

import io
import json
from typing import Any

import polars as pl
import pytest

from qaq_pipeline import schema
from qaq_pipeline.config import ExportSettings
from qaq_pipeline.exports import EXPORTERS, alpaca_json, flat_scores, messages_jsonl, scores_parquet
from qaq_pipeline.schema import Decisions, SelectedSubset, dtypes, enforce
from qaq_pipeline_tests.frames import pair_name

SCORE = {
    "rmi": 0.5,
    "log_ppl_q": 2.0,
    "log_ppl_q_given_a": 1.5,
    "log_ppl_a": 1.0,
    "log_ppl_a_given_q": 0.5,
    "ifd_ppl": 0.6,
    "ifd_loss": 0.5,
    "num_q_tokens": 7,
    "num_a_tokens": 11,
    "num_a_tokens_untruncated": 11,
    "is_truncated": False,
    "is_short_query": False,
    "stratum": 1,
    "num_strata": 1,
    "rank": 0.75,
    "null_reason": None,
}
VERDICT = {"reason": "within_budget", "score": 0.25, "position": 1, "cut": 0.25, "pool_size": 2}


def selected(*texts: tuple[str | None, str, str]) -> pl.DataFrame:
    """SelectedSubset of (system, query, answer)."""
    rows = [
        {
            "batch": "b1",
            "source_file": "a.jsonl",
            "source_row": number,
            "turn_index": 0,
            "position": number,
            "pair_id": pair_name(number),
            "system": system,
            "query": query,
            "answer": answer,
        }
        for number, (system, query, answer) in enumerate(texts, start=1)
    ]
    return enforce(SelectedSubset, pl.DataFrame(rows, schema=dtypes(SelectedSubset)))


THREE = selected(
    (None, 'Say "größer" in 日本語', "a\nb\t\\ \u2028 😀"),
    ("Be brief.", "  indent kept \n", "def f():\n    return '</s>'\n"),
    ("", "q", "a"),
)
WITHOUT_SYSTEM = selected((None, "q", "a"), ("", "r", "b"))


def test_messages_are_one_conversation_a_line_to_the_byte() -> None:
    expected = [
        r'{"messages": [{"role": "user", "content": "Say \"größer\" in 日本語"}, '
        '{"role": "assistant", "content": "a\\nb\\t\\\\ \u2028 😀"}]}',
        r'{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  indent kept \n"}, '
        r"""{"role": "assistant", "content": "def f():\n    return '</s>'\n"}]}""",
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
    ]
    assert messages_jsonl(THREE).decode() == "".join(line + "\n" for line in expected)


def test_messages_load_back_line_by_line() -> None:
    conversations = [json.loads(line)["messages"] for line in messages_jsonl(THREE).split(b"\n")[:-1]]
    pairs = [(turns[-2]["content"], turns[-1]["content"]) for turns in conversations]
    assert pairs == THREE.select("query", "answer").rows()
    frame = pl.read_ndjson(io.BytesIO(messages_jsonl(THREE)))
    assert frame["messages"].list.len().to_list() == [2, 3, 2]


def test_alpaca_is_one_json_array_to_the_byte() -> None:
    expected = [
        r'{"instruction": "Say \"größer\" in 日本語", "input": "", '
        '"output": "a\\nb\\t\\\\ \u2028 😀", "system": ""}',
        r"""{"instruction": "  indent kept \n", "input": "", "output": "def f():\n    return '</s>'\n", """
        '"system": "Be brief."}',
        '{"instruction": "q", "input": "", "output": "a", "system": ""}',
    ]
    assert alpaca_json(THREE).decode() == "[\n" + ",\n".join(expected) + "\n]\n"


def test_alpaca_rows_all_have_the_same_fields() -> None:
    with_system = json.loads(alpaca_json(THREE))
    assert {tuple(record) for record in with_system} == {("instruction", "input", "output", "system")}
    without = json.loads(alpaca_json(WITHOUT_SYSTEM))
    assert {tuple(record) for record in without} == {("instruction", "input", "output")}


def test_an_empty_selection_is_an_empty_file_that_loads() -> None:
    assert messages_jsonl(selected()) == b""
    assert json.loads(alpaca_json(selected())) == []


def test_the_order_of_the_rows_is_that_of_the_selection() -> None:
    backwards = THREE[::-1]
    assert [record["instruction"] for record in json.loads(alpaca_json(backwards))] == backwards["query"].to_list()
    last = messages_jsonl(backwards).split(b"\n")[2]
    assert json.loads(last)["messages"][0]["content"] == THREE["query"][0]


@pytest.mark.parametrize("name", list(EXPORTERS))
def test_training_files_hold_texts_and_no_score(name: str) -> None:
    _, write = EXPORTERS[name]
    keys: set[str] = set()
    json.loads(write(THREE).split(b"\n")[0] if name == "messages" else write(THREE), object_hook=keys.update)
    assert keys <= {"messages", "role", "content", "instruction", "input", "output", "system"}


def test_every_format_of_the_settings_has_an_exporter() -> None:
    assert set(EXPORTERS) == set(ExportSettings.model_validate({}).formats)
    assert len({file_name for file_name, _ in EXPORTERS.values()}) == len(EXPORTERS)


# --- scores ---------------------------------------------------------------------------------------------------------


def decisions(*rows: dict[str, Any]) -> pl.DataFrame:
    """Decisions of rows 1, 2, 3, …: two models, two selections, unless a row says otherwise."""
    common = {
        "batch": "b1",
        "source_file": "a.jsonl",
        "turn_index": 0,
        "decision": "selected",
        "reason": "within_budget",
        "explanation": "Because.",
        "gap": 0.25,
        "rank_sum": 1.25,
        "provenance_id": pair_name(0),
        "scores": [SCORE | {"model": "strong"}, SCORE | {"model": "weak", "rmi": -0.5, "rank": 0.5}],
        "verdicts": [
            VERDICT | {"selection": "diff_high", "is_selected": True},
            VERDICT | {"selection": "control_random", "is_selected": False, "position": 2},
        ],
    }
    numbered = [{"source_row": n, "pair_id": pair_name(n)} | row for n, row in enumerate(rows, start=1)]
    return enforce(Decisions, pl.DataFrame([common | row for row in numbered], schema=dtypes(Decisions)))


REJECTED = {
    "pair_id": None,
    "decision": "rejected",
    "reason": "empty_query",
    "gap": None,
    "rank_sum": None,
    "scores": [],
    "verdicts": [],
}
DUPLICATE = {
    "pair_id": pair_name(1),
    "decision": "duplicate",
    "reason": "exact_duplicate",
    "duplicate_of": "b1/a.jsonl:1.0",
    "verdicts": [],
}


def test_flat_scores_have_a_column_for_each_score_and_model_and_each_selection() -> None:
    flat = flat_scores(decisions({}, REJECTED, DUPLICATE))
    kept = ["pair_id", "decision", "reason", "explanation", "duplicate_of", "similarity", "evidence"]
    kept += ["gap", "rank_sum", "provenance_id"]
    by_model = [f"{field}_{role}" for role in ("strong", "weak") for field in SCORE]
    by_selection = [
        f"{field}:{name}"
        for name in ("diff_high", "control_random")
        for field in ("is_selected", "reason", "score", "position")
    ]
    assert flat.columns == [*schema.ROW_KEY, *kept, *by_model, *by_selection]
    assert not any(dtype.is_nested() for dtype in flat.dtypes)


def test_flat_scores_keep_every_row_in_order_with_its_own_numbers() -> None:
    flat = flat_scores(decisions({}, REJECTED, DUPLICATE))
    assert flat["source_row"].to_list() == [1, 2, 3]
    assert flat["rmi_strong"].to_list() == [0.5, None, 0.5]
    assert flat["rmi_weak"].to_list() == [-0.5, None, -0.5]
    assert flat["rank_weak"].to_list() == [0.5, None, 0.5]
    assert flat["is_selected:diff_high"].to_list() == [True, None, None]
    assert flat["position:control_random"].to_list() == [2, None, None]


def test_the_scores_file_joins_the_training_rows_on_either_key() -> None:
    scores = pl.read_parquet(io.BytesIO(scores_parquet(decisions({}, {}, DUPLICATE))))
    rows = selected((None, "q", "a"), (None, "r", "b"))
    by_row = rows.join(scores, on=schema.ROW_KEY, how="left", validate="1:1")
    assert by_row["rmi_strong"].to_list() == [0.5, 0.5]
    by_pair = rows.join(scores, on="pair_id", how="left", validate="1:m")
    assert by_pair["decision"].to_list() == ["selected", "duplicate", "selected"]


def test_scores_of_a_batch_without_pairs_are_its_rows() -> None:
    flat = flat_scores(decisions(REJECTED))
    assert flat["decision"].to_list() == ["rejected"]
    assert flat_scores(decisions()).is_empty()


def test_batches_of_other_models_and_selections_lie_side_by_side() -> None:
    other = {
        "batch": "b2",
        "scores": [SCORE | {"model": "tiny"}],
        "verdicts": [VERDICT | {"selection": "rmi_band", "is_selected": True}],
    }
    flat = flat_scores(decisions({}, other))
    assert flat["rmi_tiny"].to_list() == [None, 0.5]
    assert flat["rmi_strong"].to_list() == [0.5, None]
    assert flat["is_selected:rmi_band"].to_list() == [None, True]
