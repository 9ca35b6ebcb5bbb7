"""The settings file: what parses, what every error names, and what the environment decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from qaq_pipeline.config.base import SettingsError, settings_hash, without_credentials
from qaq_pipeline.config.load import dagster_home, home_directory, load_settings, packaged_profiles, parse_settings
from qaq_pipeline.config.selections import Budget
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline_tests.support.sentences import Check

MODELS = {"strong": {"directory": "big"}, "weak": {"directory": "small"}}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QAQ_HOME", "QAQ_CONFIG", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)


def settings(**values: Any) -> Settings:
    return parse_settings(yaml.safe_dump({"models": MODELS} | values), "mine.yaml")


def refusal(**values: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        settings(**values)
    text = str(caught.value)
    assert text.startswith("mine.yaml: ")
    return text


def nested_models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """`model` and every model that its fields can hold."""
    found = {model}
    pending: list[Any] = [field.annotation for field in model.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in found:
            found.add(annotation)
            pending += [field.annotation for field in annotation.model_fields.values()]
        pending += getattr(annotation, "__args__", ())
    return found


ALL_MODELS = sorted(nested_models(Settings), key=lambda model: model.__name__)


def test_every_packaged_profile_parses() -> None:
    profiles = packaged_profiles()
    assert "demo" in profiles
    for profile in profiles:
        assert {"strong", "weak"} <= set(load_settings(profile).models)


def test_the_smallest_file_names_two_models() -> None:
    smallest = settings()
    assert (smallest.published.name, smallest.published.valid) == ("qaq", True)
    assert smallest.scoring.quantities == ("rmi", "ifd", "end")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"scoring": {"max_tokens": 3}}, ["scoring.max_tokens", "16", "got 3"]),
        ({"scoring": {"max_tokens": "many"}}, ["scoring.max_tokens", "integer", "got 'many'"]),
        ({"scoring": {"prior": "none"}}, ["scoring.prior", "'null_answer', 'user' or 'bare'", "got 'none'"]),
        ({"scoring": {"quantities": []}}, ["scoring.quantities", "at least 1"]),
        ({"records": {"shape": "csv"}}, ["records.shape", "'alpaca'", "got 'csv'"]),
        ({"ranking": {"num_strata": 0}}, ["ranking.num_strata", "greater than or equal to 1", "got 0"]),
        ({"export": {"formats": ["xml"]}}, ["export.formats.0", "'parquet' or 'hf'", "got 'xml'"]),
        ({"export": {"selections": ["nope"]}}, ["export.selections: 'nope' is not a selection", "['qaq']"]),
        ({"export": {"selections": "some"}}, ["export.selections", "'published' or 'all'", "got 'some'"]),
        (
            {"runtime": {"executor": "slurm"}},
            ["executor", "'in_process', 'multiprocess', 'k8s' or 'ray'", "got 'slurm'"],
        ),
        ({"runtime": {"executor_config": {"a": 1}}}, ["runtime: executor_config is for the executors k8s and ray"]),
        ({"runtime": {"submit_to": "dagster:3000"}}, ["runtime: submit_to is the address of a webserver, such as"]),
        ({"runtime": {"max_runtime_seconds": 0}}, ["runtime.max_runtime_seconds", "greater than 0", "got 0"]),
        ({"runtime": {"pool": {"kind": "in_process", "size": 2}}}, ["runtime.pool: kind: in_process has one process"]),
        ({"runtime": {"pool": {"address": "auto"}}}, ["runtime.pool: address is that of a Ray cluster; set kind: ray"]),
        (
            {"models": MODELS | {"third": {"hub": "a", "device": "cuda", "gpus": 0}}},
            ["models.third: gpus: 0 leaves no GPU"],
        ),
        (
            {"models": MODELS | {"third": {"hub": "a", "device": "mps"}}, "runtime": {"pool": {"kind": "ray"}}},
            ["models: `device: mps` is of this machine"],
        ),
        ({"models": MODELS | {"third": {"hub": "a/b", "gpus": 2}}}, ["models.third.gpus", "less than or equal to 1"]),
        ({"runtime": {"lock_timeout_seconds": -1}}, ["lock_timeout_seconds", "greater than or equal to 0", "got -1"]),
        ({"scorring": {}}, ["scorring: there is no such setting", "did you mean 'scoring'?"]),
        ({"models": MODELS | {"Third": {"directory": "x"}}}, ["models.Third", "pattern", "got 'Third'"]),
        ({"models": {"strong": {"directory": "big"}}}, ["weak", "required"]),
        ({"models": MODELS | {"third": {}}}, ["models.third", "exactly one of hub, directory, gguf", "none"]),
        ({"models": MODELS | {"third": {"hub": "a/b", "gguf": "c"}}}, ["models.third", "['hub', 'gguf']"]),
        (
            {"models": MODELS | {"third": {"gguf": "c", "revision": "d"}}},
            ["models.third", "revision", "hub model only"],
        ),
        (
            {"models": MODELS | {"third": {"gguf": "c", "frame": "plain", "chat_template_from": "d"}}},
            ["models.third", "chat_template_from needs frame: chat"],
        ),
        (
            {"models": MODELS | {"third": {"gguf": "c", "template_variables": {"messages": "x"}}}},
            ["models.third", "template_variables: the pipeline itself sets messages"],
        ),
        (
            {"models": MODELS | {"third": {"gguf": "c", "template_variables": {"a": [1]}}}},
            ["models.third.template_variables.a", "got [1]"],
        ),
        ({"models": MODELS | {"third": {"gguf": "c", "device": "tpu"}}}, ["models.third.device", "cuda", "got 'tpu'"]),
    ],
)
def test_an_error_names_the_file_the_field_the_value_and_what_is_allowed(
    values: dict[str, Any], named: list[str]
) -> None:
    text = refusal(**values)
    for part in named:
        assert part in text


def test_every_fault_is_named_at_once() -> None:
    text = refusal(executor="k8s", scoring={"max_tokens": 3, "batch_tokens": 3})
    assert "3 setting(s)" in text
    assert all(field in text for field in ("executor", "scoring.max_tokens", "scoring.batch_tokens"))


@pytest.mark.parametrize(
    ("selections", "others"),
    [("published", []), ("all", ["b", "c"]), (["c"], ["c"]), (["c", "b", "a"], ["b", "c"]), ([], [])],
)
def test_the_published_selection_and_its_controls_are_always_exported(
    selections: str | list[str], others: list[str]
) -> None:
    named = [{"name": name, "strategy": "rmi_top"} for name in "abc"]
    found = settings(selections=named, export={"selections": selections}).exported
    assert found == ["a", "control_random", "control_stratified_random", *others]


@pytest.mark.parametrize(
    ("selection", "named"),
    [
        ({"strategy": "rmi_top", "model": "tiny"}, ["'mine' uses the model 'tiny'", "['strong', 'weak']"]),
        ({"strategy": "diff_high", "name": "control_mine"}, ["'control_mine'", "'control_'"]),
        ({"strategy": "diff_high", "name": "Mine!"}, ["name", "pattern", "got 'Mine!'"]),
        ({"strategy": "rmi_band", "band": [0.75, 0.5]}, ["band: ", "must be [lo, hi] with lo < hi", "[0.75, 0.5]"]),
        ({"strategy": "rmi_band", "band": [0.5, 0.5]}, ["band: ", "must be [lo, hi] with lo < hi"]),
        ({"strategy": "rmi_band", "band": [0.5, 1.1]}, ["band.1: ", "less than or equal to 1", "got 1.1"]),
        ({"strategy": "rmi_band", "budget": {"count": 3}}, ["budget: there is no such setting", "'band'"]),
        ({"strategy": "diff_low", "rank_strong": [0.9, 0.1]}, ["rank_strong: ", "must be [lo, hi] with lo < hi"]),
        (
            {"strategy": "sum_high", "rmi_strong": [0.9, 0.9]},
            ["rmi_strong: ", "must be [lo, hi] with lo < hi", "[0.9, 0.9]"],
        ),
        ({"strategy": "random", "budget": {"count": 3, "fraction": 0.5}}, ["budget", "['fraction', 'count']"]),
        ({"strategy": "random", "budget": {}}, ["budget", "exactly one of fraction, count, answer_tokens", "none"]),
        (
            {"strategy": "random", "budget": {"fraction": 1.5}},
            ["budget.fraction", "less than or equal to 1", "got 1.5"],
        ),
        ({"strategy": "random", "seed": -1}, ["seed", "greater than or equal to 0"]),
        ({"strategy": "best"}, ["strategy", "'diff_high'"]),
    ],
)
def test_a_selection_that_cannot_be_is_refused(selection: dict[str, Any], named: list[str]) -> None:
    text = refusal(selections=[{"name": "mine"} | selection])
    assert "selections" in text
    for part in named:
        assert part in text


JUDGE = {"name": "judge", "path": "judge.csv", "key": "pair_id"}


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        ({"where": [{"column": "language"}]}, ["where.0: ", "exactly one of equals, one_of", "got none"]),
        (
            {"where": [{"column": "language", "equals": "c", "at_most": 1}]},
            ["where.0: ", "exactly one of", "['equals', 'at_most']"],
        ),
        ({"where": [{"column": "language", "one_of": []}]}, ["where.0.one_of", "at least 1"]),
        ({"where": [{"column": "licence", "equals": "MIT"}]}, ["'mine' names the column 'licence'", "judge.COLUMN"]),
        ({"where": [{"column": "runs.passed", "equals": True}]}, ["'runs.passed'", "record.FIELD, judge.COLUMN"]),
        ({"where": [{"column": "record.a'b", "is_present": True}]}, ["where.0.column", "pattern"]),
        ({"quotas": {"per": "lang", "shares": "equal"}}, ["'mine' names the column 'lang'", "known: language, source"]),
        ({"quotas": {"per": "language", "shares": "even"}}, ["shares", "'equal' or 'proportional'"]),
        (
            {"quotas": {"per": "language", "shares": {"go": 0.7, "c": 0.4}}},
            ["quotas: ", "they sum to 1.1", "at most 1"],
        ),
        ({"quotas": {"per": "language", "shares": {}}}, ["quotas: ", "they sum to 0"]),
        ({"quotas": {"per": "language", "shares": {"go": 0}}}, ["shares", "greater than 0"]),
        ({"max_per_query": 0}, ["max_per_query", "greater than or equal to 1"]),
        ({"max_per_cluster": 0}, ["max_per_cluster", "greater than or equal to 1"]),
    ],
)
def test_a_condition_that_cannot_be_is_refused(grammar: dict[str, Any], named: list[str]) -> None:
    for strategy in ("diff_high", "rmi_band", "random"):
        text = refusal(selections=[{"name": "mine", "strategy": strategy} | grammar], tables=[JUDGE])
        for words in named:
            assert words in text


def test_shares_that_sum_to_one_as_written_are_accepted() -> None:
    shares = {f"l{number}": 0.1 for number in range(10)}
    selection = {"name": "mine", "strategy": "length", "quotas": {"per": "record.kind", "shares": shares}}
    assert settings(selections=[selection]).published.columns == ["record.kind"]


def test_tables_have_names_of_their_own() -> None:
    assert "tables: 'judge' appears twice" in refusal(tables=[JUDGE, JUDGE])
    assert "'record' is the prefix" in refusal(tables=[JUDGE | {"name": "record"}])


def test_a_table_that_no_selection_names_is_not_read() -> None:
    where = [{"column": "judge.score", "at_least": 7}]
    tables = [JUDGE, JUDGE | {"name": "runs"}]
    read = settings(selections=[{"name": "a", "strategy": "length", "where": where}], tables=tables).tables_read
    assert [table.name for table in read] == ["judge"]
    assert settings(tables=tables).tables_read == []


def test_quotas_divide_the_budget_of_a_batch_only() -> None:
    selection = {"name": "mine", "strategy": "length", "quotas": {"per": "language", "shares": "equal"}}
    pool = {"pool": "reference", "reference": {"name": "r1", "batches": ["b1"]}}
    assert "'mine' has quotas" in refusal(selections=[selection], ranking=pool)


def test_rows_are_held_out_with_their_whole_cluster_only() -> None:
    alone = {"duplicates": {"across_batches": False}}
    text = refusal(held_out={"share": 0.1}, screening=alone)
    assert "held_out: rows are held out with all rows of their cluster" in text
    assert "screening.duplicates.across_batches: true" in text
    assert settings(screening=alone).held_out.share == 0
    assert "less than or equal to 0.5" in refusal(held_out={"share": 0.6})


def test_whole_records_are_published_only_where_one_pair_in_its_context_stands_for_each() -> None:
    whole, history = {"rows": "conversation"}, {"context": "history"}
    assert "records.multi_turn: last and records.context: history" in refusal(export=whole)
    assert "export.rows: conversation publishes" in refusal(export=whole, records=history | {"multi_turn": "every"})
    assert "export.meta: " in refusal(export=whole | {"meta": True}, records=history)
    assert settings(export=whole, records=history).export.written == ("conversation",)
    assert "alpaca has no place for earlier turns" in refusal(records=history)
    assert settings(records=history, export={"formats": ["messages"]}).export.written == ("messages",)


def test_a_cluster_contains_the_near_duplicates_of_its_rows() -> None:
    limits = {"near_threshold": 0.6, "cluster_threshold": 0.7}
    text = refusal(screening={"duplicates": limits})
    assert "cluster_threshold: 0.7 is above near_threshold 0.6" in text
    duplicates = settings(screening={"duplicates": limits | {"near_threshold": None}}).screening.duplicates
    assert duplicates.cluster_threshold == 0.7


def test_unset_conditions_leave_no_trace_in_the_hash() -> None:
    plain, given = (
        settings(selections=[{"name": "mine", "strategy": "length"} | grammar]).published
        for grammar in ({}, {"where": [], "quotas": None, "max_per_query": None, "max_per_cluster": None})
    )
    assert not {"where", "quotas", "max_per_query", "max_per_cluster"} & set(plain.model_dump(mode="json"))
    assert settings_hash(plain) == settings_hash(given)
    condition = {"column": "language", "equals": False}
    selection = settings(selections=[{"name": "mine", "strategy": "length", "where": [condition]}]).published
    assert selection.model_dump(mode="json")["where"] == [condition]


def test_a_defect_is_named_once_and_known() -> None:
    assert "'echo' appears twice" in refusal(calibration={"defects": ["echo", "refusal", "echo"]})
    assert "other_answer" in refusal(calibration={"defects": ["typo"]})
    assert "checks.min_auc" in refusal(checks={"min_auc": 0.4})


def test_without_an_rmi_there_is_nothing_to_calibrate() -> None:
    ifd = {"scoring": {"quantities": ["ifd"]}, "selections": [{"name": "mine", "strategy": "ifd"}]}
    assert not parse_settings(yaml.safe_dump({"models": MODELS} | ifd)).is_calibrated
    assert parse_settings(yaml.safe_dump({"models": MODELS})).is_calibrated


@pytest.mark.parametrize("section", [{"calibration": {"enabled": False}}, {"scoring": {"quantities": ["ifd"]}}])
def test_a_selection_of_valid_pairs_needs_the_planted_rows_that_set_the_cuts(section: dict[str, Any]) -> None:
    longest = {"name": "mine", "strategy": "length"}
    text = refusal(selections=[longest | {"valid": True}], **section)
    assert "'mine' takes valid pairs only (valid: true), and the cuts of validity come from planted rows" in text
    assert settings(selections=[longest], **section)


def test_two_selections_have_two_names(check_sentence: Check) -> None:
    twice = {"name": "mine", "strategy": "diff_high"}
    check_sentence(refusal(selections=[twice, twice | {"strategy": "sum_low"}]))


@pytest.mark.parametrize(
    ("quantities", "selection"),
    [
        (["rmi"], {"strategy": "ifd"}),
        (["rmi"], {"strategy": "ppl", "measure": "log_ppl_a"}),
        (["rmi"], {"strategy": "ppl", "measure": "log_ppl_a_given_q"}),
        (["ifd"], {"strategy": "ppl", "measure": "log_ppl_q"}),
        (["ifd"], {"strategy": "diff_high"}),
        (["ifd"], {"strategy": "rmi_band"}),
        (["ifd"], {"strategy": "stratified_random"}),
    ],
)
def test_a_selection_needs_the_scores_it_orders_by(quantities: list[str], selection: dict[str, Any]) -> None:
    [lacking] = {"rmi", "ifd"} - set(quantities)
    text = refusal(scoring={"quantities": quantities}, selections=[{"name": "mine"} | selection])
    assert f"'mine' needs `{lacking}` in scoring.quantities" in text
    assert settings(scoring={"quantities": [lacking]}, selections=[{"name": "mine"} | selection])


@pytest.mark.parametrize(
    ("text", "named"),
    [("models: [", "not valid YAML"), ("- a\n- b", "not list"), ("", "not NoneType"), ("just words", "not str")],
)
def test_a_file_that_is_no_mapping_is_refused(text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=f"mine.yaml: .*{named}"):
        parse_settings(text, "mine.yaml")


def test_yaml_cannot_build_objects() -> None:
    with pytest.raises(SettingsError, match="not valid YAML"):
        parse_settings("models: !!python/object/apply:os.getcwd []")


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(SettingsError, match=r"missing\.yaml.*QAQ_CONFIG.*demo"):
        load_settings(missing)


def test_qaq_config_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"models": MODELS, "ranking": {"num_strata": 3}}), encoding="utf-8")
    monkeypatch.setenv("QAQ_CONFIG", str(file))
    assert load_settings().ranking.num_strata == 3
    assert load_settings("demo") != load_settings()
    monkeypatch.setenv("QAQ_CONFIG", "demo")
    assert load_settings() == load_settings("demo")
    monkeypatch.setenv("QAQ_CONFIG", "")
    assert load_settings() == load_settings("demo")


def test_home_is_var_here_unless_qaq_home_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings().home == tmp_path / "var"
    assert not (tmp_path / "var").exists()
    monkeypatch.setenv("QAQ_HOME", str(tmp_path / "elsewhere"))
    elsewhere = load_settings()
    assert elsewhere.home == home_directory() == tmp_path / "elsewhere"
    assert elsewhere.storage_root == str(tmp_path / "elsewhere" / "storage")
    assert elsewhere.model_cache_dir == tmp_path / "elsewhere" / "models"
    assert dagster_home() == tmp_path / "elsewhere" / "dagster"
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "instance"))
    assert dagster_home() == tmp_path / "instance"


@pytest.mark.parametrize(("landing", "root"), [("/data", "/data/storage"), ("/data/new/", "/data"), ("/data", "/data")])
def test_the_landing_zone_and_the_storage_lie_in_two_folders(landing: str, root: str, check_sentence: Check) -> None:
    with pytest.raises(SettingsError) as error:
        settings(landing={"url": landing}, storage={"root": root})
    check_sentence(error.value)
    assert settings(landing={"url": "/data/new"}, storage={"root": "/data/newer"}).landing_url == "/data/new"


def test_the_file_may_place_storage_and_models() -> None:
    placed = settings(storage={"root": "s3://bucket/qaq"}, model_cache="models")
    assert placed.storage_root == "s3://bucket/qaq"
    assert placed.model_cache_dir == Path("models")


@pytest.mark.parametrize("model", ALL_MODELS, ids=lambda model: model.__name__)
def test_every_part_of_the_settings_is_closed_frozen_and_described(model: type[BaseModel]) -> None:
    assert model.model_config.get("extra") == "forbid"
    assert model.model_config.get("frozen") is True
    undescribed = {name for name, field in model.model_fields.items() if not field.description}
    assert undescribed <= {"strategy", "kind"}  # The discriminators: their class says what it does.
    assert model.__doc__


def test_settings_do_not_change() -> None:
    frozen = settings()
    with pytest.raises(ValidationError, match="frozen"):
        frozen.executor = "multiprocess"  # pyrefly: ignore[read-only]
    with pytest.raises(ValidationError, match="frozen"):
        frozen.scoring.max_tokens = 32  # pyrefly: ignore[read-only]


def test_the_hash_is_that_of_the_values() -> None:
    one, same, other = settings(), settings(), settings(scoring={"max_tokens": 1024})
    assert settings_hash(one.scoring) == settings_hash(same.scoring) != settings_hash(other.scoring)
    assert settings_hash(one.ranking) == settings_hash(other.ranking)
    assert settings_hash(one.selections) == settings_hash(same.selections)
    assert settings_hash(one.scoring, one.ranking) != settings_hash(one.ranking, one.scoring)
    assert len(settings_hash(one)) == 16


def test_a_value_given_as_its_default_changes_no_hash() -> None:
    assert settings_hash(settings(scoring={"max_tokens": 2048}).scoring) == settings_hash(settings().scoring)


def test_the_hash_is_the_same_in_every_process_and_version() -> None:
    assert settings_hash(Budget(fraction=0.25, count=None, answer_tokens=None)) == "4fb8d9355e1d5232"


@pytest.mark.parametrize("name", ["2026-11-02", "b1", "A", "0", "a.b_c-d", "a" * 100])
def test_a_plain_name_can_name_a_batch(name: str) -> None:
    assert check_batch_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "../evil", "..", "a/b", "a\\b", "[x]", "x|y", "a..b", "a\n", "\na", ".hidden", "-x", "_x"),
        *("a b", "a*", "a?", "a:b", "a,b", "a\x00", "ä", "²", "a" * 101, "a" * 300),
    ],
)
def test_a_hostile_name_cannot_name_a_batch(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be used: give a letter or digit") as caught:
        check_batch_name(name)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=120))
def test_an_accepted_batch_name_is_one_plain_path_part(name: str) -> None:
    try:
        check_batch_name(name)
    except ValueError:
        return
    assert Path(name).parts == (name,)
    assert name.isascii()
    assert not set(name) & set("|/\\*?[]\n\0")
    assert ".." not in name


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"storage": {"root": "sftp://me:planted@host/data"}}, "storage.root"),
        ({"landing": {"url": "https://planted@host/zone"}}, "landing.url"),
        ({"runtime": {"submit_to": "http://me:planted@host:3000"}}, "runtime.submit_to"),
        (
            {
                "screening": {
                    "contamination": {"benchmarks": [{"name": "a", "path": "https://h/b?X-Amz-Signature=planted"}]}
                }
            },
            "screening.contamination.benchmarks.0.path",
        ),
        ({"runtime": {"executor": "ray", "executor_config": {"a": ["x://h?token=planted"]}}}, "executor_config.a.0"),
    ],
)
def test_a_url_with_credentials_is_refused_since_settings_are_published(values: dict[str, Any], place: str) -> None:
    text = refusal(**values)
    assert f"{place}: a URL contains a password, a token or a signature" in text
    assert "planted" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:planted@host/a.jsonl: missing", "https://host/a.jsonl: missing"),
        ("see 'https://h/a?part=1&sig=planted&b=2'.", "see 'https://h/a?part=1&sig=…&b=2'."),
        ("https://h/a?X-Amz-Credential=p%2Fq&X-Amz-Signature=p", "https://h/a?X-Amz-Credential=…&X-Amz-Signature=…"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("hf://datasets/org/name@main/a.jsonl?split=train", "hf://datasets/org/name@main/a.jsonl?split=train"),
        ("s3://bucket/a@b/x.jsonl", "s3://bucket/a@b/x.jsonl"),
        ("postgresql://qaq:pa/ss@db/qaq", "postgresql://db/qaq"),
        ("https://user:p@ss@host/a", "https://host/a"),
        ("https://host/a#access_token=planted", "https://host/a#access_token=…"),
        ("https://host/a?design=3&monkey=1&page=2", "https://host/a?design=3&monkey=1&page=2"),
    ],
)
def test_credentials_of_urls_are_left_out(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
