"""card: metadata that the hub reads, numbers that agree with the decisions, and tables that no name can break."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import ExportSettings, Settings
from qaq_pipeline.ingest.records import ASIDE_KEY, UNREAD_KEY
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.curated_dataset import publish, read_batches
from qaq_pipeline.publication.dataset_card import dataset_card
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import Decisions, RawData, dtypes
from qaq_pipeline.schema.vocabularies import Signal
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.selection.scored_batch import UNREACHED_KEY, VALIDITY_KEY
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty
from qaq_pipeline_tests.support.frames import HOSTILE_NAMES, IDENTITY, raw_rows, store_batch
from qaq_pipeline_tests.support.sentences import Check

MODELS = "models: {strong: {hub: tiny/strong}, weak: {hub: tiny/weak}}\n"
SETTINGS = MODELS + "selections: [{name: diff_high, strategy: diff_high}]\n"
NO_SCORES = pl.lit([], dtype=dtypes(Decisions)["scores"]).alias("scores")
SHA256 = hashlib.sha256(b"benchmark").hexdigest()


@pytest.fixture
def settings() -> Settings:
    return parse_settings(SETTINGS)


def published_folder(storage: Storage, settings: Settings, *registered: str) -> Path:
    batches, excluded = read_batches(storage, registered, settings)
    return Path(publish(storage, settings, batches, excluded).url)


def entry(batch: str = "b1", rows_in: int = 0, rows_selected: int = 0, **identity: str) -> dict[str, Any]:
    """The part of a batch's manifest entry that the card shows."""
    model = dataclasses.asdict(IDENTITY) | identity
    return {"batch": batch, "rows_in": rows_in, "rows_selected": rows_selected, "models": {"strong": model}}


def card_of(
    benchmarks: Mapping[str, Any] | None = None,
    made_of: Mapping[str, Any] | None = None,
    unread: Mapping[str, int] | None = None,
    decisions: pl.DataFrame | None = None,
    screened: pl.DataFrame | None = None,
    **changes: Any,
) -> str:
    """The card of a version without rows, with the given changes."""
    benchmarks, made_of = benchmarks or {}, made_of or {}
    decisions = empty(Decisions) if decisions is None else decisions
    if screened is None:
        screened = decisions.select(*ROW_KEY, status=pl.lit("accepted"), evidence=pl.lit(None, pl.String))
    parts: dict[str, Any] = {
        "selection": parse_settings(SETTINGS).published,
        "exported": {"diff_high": 0},
        "export": ExportSettings.model_validate({}),
        "llama_factory": None,
        "entries": [entry()],
        "tables": {
            batch: {
                "raw_data": StoredTable(
                    empty(RawData), {UNREAD_KEY: {"records": 5, "with_field": unread or {}}, ASIDE_KEY: []}
                ),
                "screened_data": StoredTable(screened, {"benchmarks": benchmarks.get(batch, {})}),
                "decisions": StoredTable(decisions, made_of.get(batch, {})),
            }
            for batch in (benchmarks.keys() | made_of.keys()) or {"b1"}
        },
    }
    return dataset_card(**(parts | changes)).decode()


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def tables(card: str) -> dict[str, list[list[str]]]:
    """The cells of each section's table as a reader sees them, by CommonMark with tables; the first row is the head."""
    _, _, body = card.split("---\n", 2)
    found: dict[str, list[list[str]]] = {}
    title = ""
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    for before, token in itertools.pairwise(tokens):
        assert token.type != "html_block"
        if before.type == "heading_open":
            title = token.content
        elif token.type == "tr_open":
            found.setdefault(title, []).append([])
        elif before.type in ("th_open", "td_open"):
            children = token.children or []
            assert {child.type for child in children} <= {"text", "text_special", "code_inline"}, token.content
            found[title][-1].append("".join(child.content for child in children))
    return found


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_the_hub_reads_the_metadata_and_every_file_that_it_names_is_there(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    folder = published_folder(storage, settings, "b1")
    card = DatasetCard.load(folder / "README.md")  # Raises of metadata that the hub would not take.
    metadata = card.data.to_dict()
    assert metadata["license"] == "unknown"
    assert metadata["language"] == ["code"]
    assert metadata["task_categories"] == ["text-generation"]
    assert metadata["size_categories"] == ["n<1K"]
    assert metadata["pretty_name"] == "Code instructions selected by QAQ: diff_high"
    assert "qaq" in metadata["tags"]
    configs = metadata["configs"]
    assert [config["config_name"] for config in configs] == [
        "diff_high-messages",
        "diff_high-prompt_completion",
        "diff_high-alpaca",
        "control_random-messages",
        "control_random-prompt_completion",
        "control_random-alpaca",
        "control_stratified_random-messages",
        "control_stratified_random-prompt_completion",
        "control_stratified_random-alpaca",
    ]
    assert [config.get("default") for config in configs] == [True, *[None] * 8]
    for config in configs:
        ((split, path),) = [(file["split"], file["path"]) for file in config["data_files"]]
        assert split == "train"
        assert (folder / path).is_file()


@pytest.mark.parametrize(
    ("num_rows", "size"),
    [(0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (99_999, "10K<n<100K"), (310_000, "100K<n<1M"), (10**9, "n>1B")],
)
def test_the_size_is_that_of_the_published_selection(num_rows: int, size: str) -> None:
    card = card_of(exported={"diff_high": num_rows, "control_random": 5})
    assert front_matter(card)["size_categories"] == [size]


def test_a_file_without_rows_is_no_configuration(storage: Storage) -> None:
    card = card_of(exported={"diff_high": 0, "control_random": 3}, export=exporting("alpaca"))
    configs = front_matter(card)["configs"]
    assert [(config["config_name"], config["default"]) for config in configs] == [("control_random-alpaca", True)]


def exporting(*formats: str, **others: Any) -> ExportSettings:
    return ExportSettings.model_validate({"formats": formats, **others})


def test_the_types_of_the_columns_are_told_so_that_no_reader_guesses_them() -> None:
    card = card_of(exported={"diff_high": 1}, export=exporting("alpaca", "sharegpt", meta=True))
    alpaca, sharegpt = front_matter(card)["dataset_info"]
    texts = ("instruction", "input", "output", "system", "meta")
    assert alpaca == {
        "config_name": "diff_high-alpaca",
        "features": [{"name": name, "dtype": "string"} for name in texts],
    }
    turn = [{"name": "from", "dtype": "string"}, {"name": "value", "dtype": "string"}]
    assert sharegpt["features"] == [{"name": "conversations", "list": turn}, {"name": "meta", "dtype": "string"}]


@pytest.mark.parametrize(
    ("formats", "configs"),
    [
        (("parquet", "hf", "sharegpt"), ["mine-sharegpt"]),
        (("hf", "parquet"), ["mine-parquet"]),
        (("hf",), []),
    ],
)
def test_configurations_are_files_of_one_loader(formats: tuple[str, ...], configs: list[str]) -> None:
    metadata = front_matter(card_of(**MINE, export=exporting(*formats)))
    assert [config["config_name"] for config in metadata["configs"]] == configs
    assert [info["config_name"] for info in metadata["dataset_info"]] == configs


MINE: dict[str, Any] = {
    "selection": parse_settings(MODELS + "selections: [{name: mine, strategy: random}]").published,
    "exported": {"mine": 2},
}


def test_every_format_is_listed_with_its_file_and_columns_and_how_it_is_loaded() -> None:
    names = ("messages", "prompt_completion", "alpaca", "sharegpt", "parquet", "hf")
    card = card_of(**MINE, export=exporting(*names), llama_factory="mine_messages")
    head, *rows = tables(card)["Files"]
    assert head == ["format", "file", "columns"]
    assert [row[0] for row in rows] == list(names)
    assert rows[2][1:] == ["alpaca.json", "instruction, input, output, system"]
    for said in (
        'load_dataset(FOLDER, "mine-messages", split="train")',
        'load_dataset(FOLDER, data_files="mine/messages.parquet", split="train")',
        'load_from_disk("FOLDER/mine/hf")',
        "`dataset: mine_messages`",
    ):
        assert said in card
    without_rows = card_of(**MINE | {"exported": {"mine": 0}}, export=exporting("messages"))
    assert "load_dataset" not in without_rows
    assert "LLaMA-Factory" not in without_rows


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_numbers_add_up_with_the_decisions_and_the_files(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings, "b1")
    store_batch(storage, settings, "b2", queries=tuple("efghijkl"))
    folder = published_folder(storage, settings, "b1", "b2")
    shown = tables((folder / "README.md").read_text(encoding="utf-8"))
    assert shown["Batches"][1:] == [
        ["b1", "5", "1", "batch:b1"],
        ["b2", "9", "2", "batch:b2"],
        ["all", "14", "3", ""],
    ]
    decisions = pl.read_parquet(folder / "scores" / "*.parquet").group_by("decision", "reason").len()
    *rows, total = shown["Decisions"][1:]
    assert {(decision, reason, int(count)) for decision, reason, count in rows} == set(decisions.rows())
    assert total == ["all", "", "14"]
    assert sum(int(row[2]) for row in rows) == 14
    for selection, count in shown["Controls"][1:]:
        assert len(json.loads((folder / selection / "alpaca.json").read_bytes())) == int(count) == 3


def test_the_strata_hold_every_ranked_pair_once_a_model(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings, "b1")
    store_batch(storage, settings, "b2", queries=tuple("efghijkl"))
    folder = published_folder(storage, settings, "b1", "b2")
    rows = tables((folder / "README.md").read_text(encoding="utf-8"))["Strata"][1:]
    # Both batches have one stratum, every log PPL(Q) is 2.0, and a quarter is taken: 3 of 4 + 8.
    assert rows == [[role, "1 of 1", "12", "3", "25%", "2.000 to 2.000"] for role in ("strong", "weak")]


def test_strata_of_pools_of_another_size_are_rows_of_their_own() -> None:
    scores = [(1, 2, 0.5), (1, 2, 1.25), (2, 2, 3.0), (1, 1, 0.75), (None, 2, None)]
    decided = pl.DataFrame(
        [
            {
                "decision": "selected" if number == 1 else "not_selected",
                "reason": "below_cut",
                "scores": [{"model": "strong", "stratum": stratum, "num_strata": of, "log_ppl_q": log_ppl_q}],
            }
            for number, (stratum, of, log_ppl_q) in enumerate(scores)
        ]
        # The same pair once more, and a row that was rejected.
        + [
            {"decision": "duplicate", "reason": "exact_duplicate", "scores": [{"model": "strong", "stratum": 1}]},
            {"decision": "rejected", "reason": "empty_query", "scores": []},
        ],
        schema=dtypes(Decisions),
    )
    assert tables(card_of(decisions=decided))["Strata"][1:] == [
        ["strong", "1 of 1", "1", "0", "0%", "0.750 to 0.750"],
        ["strong", "1 of 2", "2", "1", "50%", "0.500 to 1.250"],
        ["strong", "2 of 2", "1", "0", "0%", "3.000 to 3.000"],
    ]


def test_the_models_are_those_of_the_manifest(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings, "b1")
    store_batch(storage, settings, "b2", queries=tuple("efgh"))
    folder = published_folder(storage, settings, "b1", "b2")
    of_batch, _ = json.loads((folder / "manifest.json").read_bytes())["batches"]
    head, *rows = tables((folder / "README.md").read_text(encoding="utf-8"))["Models"]
    assert [(row[0], row[-1]) for row in rows] == [("strong", "b1, b2"), ("weak", "b1, b2")]
    for row in rows:
        identity = of_batch["models"][row[0]]
        fields = [title.replace(" ", "_") for title in head[1:-1]]
        assert {"model", "revision", "dtype", "template_hash"} <= set(fields)
        assert [cell.replace(",", "") for cell in row[1:-1]] == [str(identity[field]) for field in fields]


def test_a_model_that_is_another_in_some_batches_has_a_row_for_each() -> None:
    card = card_of(entries=[entry("b1"), entry("b2", revision="files:1"), entry("b3")])
    _, *rows = tables(card)["Models"]
    assert [(row[2], row[-1]) for row in rows] == [("files:0", "b1, b3"), ("files:1", "b2")]


def test_a_batch_shows_the_pool_of_its_ranks() -> None:
    pool = rank_reference.pool_id("r1", "0f")
    assert tables(card_of(entries=[entry() | {"pool": pool}]))["Batches"][1] == ["b1", "0", "0", pool]


def test_the_recipe_is_the_selection_of_the_settings() -> None:
    settings = parse_settings(
        MODELS + "selections: [{name: half, strategy: diff_high, budget: {fraction: 0.5}, rank_strong: [0.1, 0.9]}]"
    )
    card = card_of(selection=settings.published, exported={"half": 0})
    recipe = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == settings.published.model_dump(mode="json")
    assert "highest gap (diff_high: the paper's QAQ)" in card


def test_fields_that_nobody_reads_are_named() -> None:
    assert "Batch `b1`: fields not read: tests (4 of 5 records);" in html.unescape(card_of(unread={"tests": 4}))
    assert "fields not read" not in card_of()


def test_the_benchmarks_are_listed_with_their_hashes_and_who_was_not_checked_is_said() -> None:
    card = card_of(benchmarks={"b1": {"humaneval": SHA256, "mbpp": "0" * 64}, "b2": {"humaneval": SHA256}, "b3": {}})
    assert tables(card)["Decontamination"][1:] == [
        ["humaneval", SHA256, "b1, b2"],
        ["mbpp", "0" * 64, "b1"],
    ]
    assert "Selected rows that contain a benchmark's task, kept and flagged in the decisions: 0.\n" in card
    assert "not checked for any benchmark: `b3`.\n" in card
    assert "not checked for any benchmark" not in card_of(benchmarks={"b1": {"humaneval": SHA256}})


def judged_facts(invalid: int = 0, *warnings: str) -> dict[str, Any]:
    """What the provenance of a batch's decisions says of its validity."""
    counts = dict.fromkeys((signal.value for signal in Signal), 0) | {"mismatch": invalid}
    return {VALIDITY_KEY: {"warnings": list(warnings), "signals": [], "valid_pairs": 1200, "invalid_pairs": counts}}


def test_invalid_pairs_are_counted_by_signal_and_unjudged_batches_are_named() -> None:
    card = card_of(made_of={"b2": judged_facts(34), "b1": judged_facts(), "old": {}})
    head, first, second = tables(card)["Validity"]
    assert head == ["batch", "pairs valid", *Signal]
    assert (first[:2], second[:2]) == (["b1", "1,200"], ["b2", "1,200"])
    assert dict(zip(head[2:], second[2:], strict=True)) == dict.fromkeys(Signal, "0") | {"mismatch": "34"}
    assert "Batches whose pairs were not judged: `old`." in card
    assert "This selection and its controls take invalid pairs too." in card
    valid = parse_settings(MODELS).published
    assert "take only valid pairs" in card_of(selection=valid, exported={"qaq": 0}, made_of={"b1": judged_facts()})


def test_what_the_signals_cannot_tell_and_an_unreached_budget_come_first_on_the_card() -> None:
    facts = judged_facts(0, "RMI tells nothing") | {
        UNREACHED_KEY: {"diff_high": "takes 4 of at most 5 pairs", "other": "takes 1 of at most 2 pairs"}
    }
    card = card_of(made_of={"b|1": facts})
    first, second = (line for line in card.splitlines() if line.startswith("> **Warning.**"))
    assert first == "> **Warning.** Batch b&#124;1: RMI tells nothing."
    assert second == "> **Warning.** Batch b&#124;1: diff_high takes 4 of at most 5 pairs."
    assert card.index(first) < card.index("Pairs of a query and an answer")


def test_selected_rows_that_were_flagged_and_not_dropped_are_counted() -> None:
    rows = raw_rows({}, {}, {}).select(pl.col("batch", "source_file", "source_row", "turn_index"))
    screened = rows.with_columns(status=pl.lit("accepted"), evidence=pl.Series(["humaneval 3", "humaneval 4", None]))
    decisions = rows.with_columns(
        NO_SCORES, decision=pl.Series(["selected", "not_selected", "selected"]), reason=pl.lit("within_budget")
    )
    card = card_of(screened=screened, decisions=decisions, benchmarks={"b1": {"humaneval": SHA256}})
    assert "flagged in the decisions: 1.\n" in card


# --- what is promised -------------------------------------------------------------------------------------------------


GROUNDS: list[dict[str, Any]] = [
    {"strategy": "diff_high"},
    {"strategy": "diff_low"},
    {"strategy": "sum_low"},
    {"strategy": "sum_high"},
    {"strategy": "rmi_band", "model": "weak"},
    {"strategy": "rmi_top"},
    {"strategy": "ifd", "measure": "ifd_loss"},
    {"strategy": "ppl", "order": "low", "model": "weak"},
    {"strategy": "length"},
    {"strategy": "random"},
    {"strategy": "stratified_random"},
]


def test_the_grounds_of_every_strategy_are_known() -> None:
    kinds = get_args(get_args(Selection)[0])
    strategies = {name for kind in kinds for name in get_args(kind.model_fields["strategy"].annotation)}
    assert {selection["strategy"] for selection in GROUNDS} == strategies


def chosen_by(**values: Any) -> str:
    """The card of a selection, its lines joined."""
    settings = parse_settings(MODELS + yaml.safe_dump({"selections": [{"name": "mine"} | values]}))
    return " ".join(card_of(selection=settings.published, exported={"mine": 0}).split())


@pytest.mark.parametrize("selection", GROUNDS, ids=lambda selection: selection["strategy"])
def test_the_card_says_by_what_the_rows_were_chosen(selection: dict[str, Any], check_sentence: Check) -> None:
    card = chosen_by(**selection)
    check_sentence(card.partition("delivered rows, ")[2].partition(" `scores/` has a file")[0])
    is_of_rmi = selection["strategy"].startswith(("diff", "sum", "rmi"))
    assert ("RMI = log PPL(Q) - log PPL(Q | A)" in card) == is_of_rmi
    assert ("chosen by how well the answer explains the query" in card) == is_of_rmi
    assert ("selected by QAQ: mine" in card) == is_of_rmi


@pytest.mark.parametrize(
    ("changes", "is_the_papers"),
    [
        ({}, True),
        ({"budget": {"fraction": 0.5}}, False),
        ({"budget": {"count": 9}}, False),
        ({"min_gap": 0.1}, False),
        ({"strategy": "diff_low"}, False),
        ({"strategy": "ifd"}, False),
    ],
)
def test_the_papers_result_is_told_of_the_papers_selection_alone(changes: dict[str, Any], is_the_papers: bool) -> None:
    assert (
        "In the paper, training on the selected quarter matched training on everything"
        in chosen_by(**{"strategy": "diff_high"} | changes)
    ) == (is_the_papers)


def test_the_controls_are_as_large_as_the_budget_says() -> None:
    assert "They have as many rows as the selection." in chosen_by(strategy="diff_high")
    of_tokens = chosen_by(strategy="diff_high", budget={"answer_tokens": 500})
    assert "They have at most as many answer tokens as the selection." in of_tokens


def test_the_same_content_has_the_same_card_which_holds_no_version_time_or_path(
    storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    elsewhere = Storage(str(tmp_path / "elsewhere"), tmp_path / "locks")
    cards = []
    for place, order in ((storage, ("b1", "b2")), (elsewhere, ("b2", "b1"))):
        for batch in order:
            store_batch(place, settings, batch)
        folder = published_folder(place, settings, *order)
        cards.append((folder / "README.md").read_text(encoding="utf-8"))
        assert folder.name not in cards[-1]
        assert str(tmp_path) not in cards[-1]
        manifest = json.loads((folder / "manifest.json").read_bytes())
        assert manifest["files"]["README.md"] == hashlib.sha256(cards[-1].encode()).hexdigest()
    assert cards[0] == cards[1]
    newest = [versions.find_version(place, "latest") for place in (storage, elsewhere)]
    assert newest[0].version == newest[1].version
    assert newest[0].excluded_batches == newest[1].excluded_batches


# --- hostile text -----------------------------------------------------------------------------------------------------

HOSTILE = [
    *HOSTILE_NAMES,
    "a|b|c",
    "a\\|b",
    "`code` ``x``",
    "<script>alert(1)</script>",
    "<!-- x",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "https://evil.example",
    "www.evil.example",
    "*bold* _italic_ ~~gone~~",
    "# title",
    "&lt;b&gt; &#124;",
    "--- | ---",
    "---",
    "$x$",
    "größe 日本",
    "`",
    "\\",
]


def as_shown(text: str) -> str:
    """What of a text a table can show: no ends, and what cannot be printed as a sign that something was there."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text).strip(" ")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_reads_as_itself_in_its_own_cell(name: str) -> None:
    card = card_of(
        entries=[entry(name, 7, 3, model=name, revision=name)],
        decisions=_decided(name),
        benchmarks={name: {name: SHA256}},
    )
    shown, said = tables(card), as_shown(name)
    assert shown["Batches"][1:] == [[said, "7", "3", ""], ["all", "7", "3", ""]]
    (model,) = shown["Models"][1:]
    assert [*model[:3], model[-1]] == ["strong", said, said, said]
    assert shown["Decisions"][1:] == [["selected", said, "1"], ["all", "", "1"]]
    assert shown["Decontamination"][1:] == [[said, SHA256, said]]


def _decided(reason: str) -> pl.DataFrame:
    rows = raw_rows({}).select(pl.col("batch", "source_file", "source_row", "turn_index"))
    return rows.with_columns(NO_SCORES, decision=pl.lit("selected"), reason=pl.lit(reason))


@given(name=st.text(max_size=30))
def test_any_name_keeps_the_table_whole(name: str) -> None:
    shown = tables(card_of(entries=[entry(name, 1, 1)]))
    assert shown["Batches"][1:] == [[as_shown(name), "1", "1", ""], ["all", "1", "1", ""]]
