"""Validity from a delivery to what a person reads, with scores made up at the models' seam."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness.staleness import changed_inputs
from qaq_pipeline.lineage import lineage, trace, verify
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.orchestration.jobs import build_job_defs
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import registration
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.partition import Input, Partition
from qaq_pipeline.schema.tables import Logprobs, dtypes
from qaq_pipeline.schema.vocabularies import GateReason, NoCutReason, Quantity, Signal
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.runtime import ScoredPairs
from qaq_pipeline.selection.scored_batch import UNREACHED_KEY
from qaq_pipeline.selection.stored_reference import CUTS, NAME
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity.words import untold
from qaq_pipeline_tests.conftest import write_jsonl
from qaq_pipeline_tests.support.frames import IDENTITY
from qaq_pipeline_tests.support.pairs import RowsInMemory, in_memory, report_of
from qaq_pipeline_tests.support.recomputed_validity import check_validity
from qaq_pipeline_tests.support.sentences import Check

INGEST, SCORE, SELECT, PUBLISH = (
    PIPELINE[name].job for name in ("raw_data", "logprobs", "decisions", "curated_dataset")
)
REFERENCE = PIPELINE[CUTS].job

SettingsFor = Callable[..., Settings]
Row = dict[str, str]

STEMS = ("sort", "merge", "parse", "count", "split")
END = "# done"
WORD = re.compile(r"[A-Za-z]+")
NUM_ROWS = 60


# --- rows -----------------------------------------------------------------------------------------------------------


def topic(number: int) -> list[str]:
    """Five words that no other number has."""
    return [f"{stem}{chr(97 + number // 26)}{chr(97 + number % 26)}" for stem in STEMS]


def clean(number: int) -> Row:
    """A query, and an answer that uses its words and ends where it should."""
    first, second, third, fourth, fifth = topic(number)
    query = f"Write code to {first} every {second} and {third} its {fourth} for {fifth}."
    lines = [
        f"def {first}({second}):",
        f"    {third} = [{fourth} for {fourth} in {second}]",
        f"    return {fifth}({third})",
    ]
    return {"query": query, "response": "\n".join([*lines, END])}


def mismatch(number: int) -> Row:
    """The answer is to a query that nobody asked."""
    return clean(number) | {"response": clean(number + 300)["response"]}


def echo(number: int) -> Row:
    return clean(number) | {"response": clean(number)["query"]}


def cut(number: int) -> Row:
    """The answer stops in its second line."""
    answer = clean(number)["response"]
    return clean(number) | {"response": answer[: answer.index("[") - 2]}


def invented(number: int) -> Row:
    """Three words of the query mean nothing."""
    query = clean(number)["query"]
    for place, word in enumerate(topic(number)[:3]):
        query = query.replace(word, f"zubrak{'vxq'[place]}{chr(97 + number % 26)}")
    return clean(number) | {"query": query}


FIRST = {mismatch: 40, echo: 45, cut: 50, invented: 55}
SIGNAL_OF = {
    mismatch: Signal.MISMATCH,
    echo: Signal.ECHO,
    cut: Signal.UNFINISHED,
    invented: Signal.IMPLAUSIBLE_QUERY,
}


def sixty_rows() -> list[Row]:
    """40 clean rows, and five with each defect."""
    defective = [make(number) for make, first in FIRST.items() for number in range(first, first + 5)]
    return [clean(number) for number in range(40)] + defective


# --- the models -----------------------------------------------------------------------------------------------------


class Reader:
    """A model runtime without a model: a pair is scored by the words that query and answer share.

    A query with an unknown word is implausible. An answer explains the query by the share of its topic that it uses,
    and nearly all of it where it repeats it. It ends well where its last line says so. With `is_blind`, every answer
    explains the same.
    """

    TOPICS = frozenset(word for number in range(400) for word in topic(number))
    KNOWN = TOPICS.union(("Write", "code", "to", "every", "and", "its", "for"))

    def __init__(self, *, is_blind: bool = False, system: str = "0") -> None:
        self._is_blind = is_blind
        self._identity = dataclasses.replace(IDENTITY, template_hash=system)

    def score(self, role: str, pairs: Pairs, *_: object) -> ScoredPairs:
        frame = pl.DataFrame([self._row(role, pair) for pair in in_memory(pairs)], schema=dtypes(Logprobs))
        provenance: dict[str, Any] = {"identity": dataclasses.asdict(self._identity)}
        provenance |= {"identity_hash": self._identity.digest(), "frame": "chat", "template": "chat", "end_ids": [7]}
        provenance |= {"scoring": {"prior": "null_answer"}, "scored_with": [], "warnings": []}
        return ScoredPairs(RowsInMemory(frame), report_of(frame.height), provenance)

    def _row(self, role: str, pair: Pair) -> dict[str, Any]:
        noise = self._noise(f"{role} {pair.pair_id}")
        words = WORD.findall(pair.query)
        log_ppl_q = (1.5 if self.KNOWN.issuperset(words) else 4.0) + 0.2 * next(noise)
        log_ppl_q_given_a = log_ppl_q * (1 - self._explained(pair) - 0.04 * next(noise))
        is_ended = pair.answer.rstrip().endswith(END)
        sums = {
            Quantity.Q: log_ppl_q * len(words),
            Quantity.Q_GIVEN_A: log_ppl_q_given_a * len(words),
            Quantity.A: 20.0,
            Quantity.A_GIVEN_Q: 10.0,
            Quantity.END: (0.3 if is_ended else 6.0) * (1 + 0.4 * next(noise)),
        }
        tokens = {"num_q_tokens": len(words), "num_a_tokens": 10, "num_a_tokens_untruncated": 10, "is_truncated": False}
        return {"pair_id": pair.pair_id, **{f"sum_nll_{one}": value for one, value in sums.items()}, **tokens}

    def _explained(self, pair: Pair) -> float:
        if self._is_blind:
            return 0.2
        if pair.query in pair.answer:
            return 0.85
        shared = self.TOPICS.intersection(WORD.findall(pair.query)).intersection(WORD.findall(pair.answer))
        return 0.02 + 0.4 * len(shared) / len(STEMS)

    @staticmethod
    def _noise(seed: str) -> Iterator[float]:
        """Numbers from -1/2 to 1/2, by the seed alone."""
        digest = hashlib.sha256(seed.encode()).digest()
        return (byte / 255 - 0.5 for byte in digest)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def curate(instance: dg.DagsterInstance, tmp_path: Path) -> Callable[..., None]:
    """Factory: deliver rows as a batch, score them, and select; what a step raises is raised."""

    def run(
        settings: Settings, rows: Sequence[Row], batch: str = "b1", runtime: Reader | None = None, last: str = SELECT
    ) -> None:
        file = write_jsonl(tmp_path / "delivered" / f"{batch}.jsonl", rows)
        registration.register(Deployment(settings, instance), batch, [file], None, replaces=True)
        for job in (INGEST, SCORE, SELECT, PUBLISH):
            run_job(settings, instance, job, batch, runtime or Reader())
            if job == last:
                break

    return run


def run_job(
    settings: Settings, instance: dg.DagsterInstance, job: str, batch: str | None = None, runtime: Reader | None = None
) -> list[str]:
    """Run a job for a batch, under every model where it scores; the warnings of its log."""
    keys: list[Any] = [None if job in (PUBLISH, REFERENCE) else batch]
    if job == SCORE:
        keys = [dg.MultiPartitionKey({"batch": str(batch), "model": role}) for role in sorted(settings.models)]
    defs = build_job_defs(settings, resource_overrides={"model_runtime": runtime or Reader()})
    logged = []
    for key in keys:
        done = defs.resolve_job_def(job).execute_in_process(instance=instance, partition_key=key)
        logged += [one.user_message for one in instance.all_logs(done.run_id) if one.level == logging.WARNING]
    return logged


def stored(settings: Settings, name: str, batch: str = "b1") -> StoredTable:
    return open_storage(settings).tables.read(name, Partition(batch))


def metadata(instance: dg.DagsterInstance, asset: str) -> dict[str, Any]:
    event = instance.get_latest_materialization_event(dg.AssetKey(asset))
    assert event is not None
    assert event.asset_materialization is not None
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def decided(settings: Settings, batch: str = "b1") -> pl.DataFrame:
    """The decisions in the order of the delivery, with the verdict of the published selection."""
    frame = stored(settings, "decisions", batch).frame.sort("source_row")
    return frame.with_columns(verdict=pl.col("verdicts").list.first().struct.field("reason"))


def no_cut(settings: Settings, batch: str = "b1") -> dict[str, str | None]:
    return dict(stored(settings, "validity_cuts", batch).frame.select("signal", "null_reason").iter_rows())


def valid_pairs(settings: Settings, batch: str = "b1") -> set[str]:
    return set(stored(settings, "validity", batch).frame.filter(pl.col("invalid_by").is_null())["pair_id"])


# --- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_with_defects_is_selected_among_its_valid_pairs(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None], check_sentence: Check
) -> None:
    settings = settings_for(calibration={})
    curate(settings, sixty_rows())
    assert set(no_cut(settings).values()) == {None}
    decisions = decided(settings)
    is_invalid = decisions["verdict"].str.starts_with("invalid")
    assert check_validity(open_storage(settings), settings, "b1") == is_invalid.sum()
    for make, first in FIRST.items():
        found = decisions.slice(first, 5).filter(verdict=f"invalid_{SIGNAL_OF[make]}")
        assert found.height >= 2  # A cut may miss up to a fifth of its defect.
        assert set(found["decision"]) == {"not_selected"}
        check_sentence(found["explanation"][0])
    assert decisions.tail(20)["verdict"].str.starts_with("invalid").sum() >= 15
    of_clean = decisions.head(40)["verdict"]
    assert of_clean.is_in(["within_budget", "below_cut"]).sum() >= 38
    valid = valid_pairs(settings)
    verdicts = decisions.select("pair_id", "verdicts").explode("verdicts").unnest("verdicts")
    chosen = dict(verdicts.filter("is_selected").group_by("selection").agg("pair_id").iter_rows())
    sizes = {name: len(pairs) for name, pairs in chosen.items()}
    assert sizes == {"qaq": 15, "control_random": 15, "control_stratified_random": 15}
    assert all(set(pairs) <= valid for pairs in chosen.values())
    assert set(stored(settings, "selected_subset").frame["pair_id"]) == set(chosen["qaq"])
    counts = metadata(instance, "validity")
    assert counts["valid_pairs"] == len(valid)
    declared = decisions["verdict"].value_counts(name="count")
    reasons = {f"invalid_{signal}": count for signal, count in counts["invalid_pairs"].items() if count}
    assert reasons == dict(declared.filter(pl.col("verdict").str.starts_with("invalid")).iter_rows())
    of_cuts = metadata(instance, "validity_cuts")
    assert of_cuts["warnings"] == []
    check_sentence("\n".join(of_cuts["signals"]))


def test_a_batch_without_a_valid_row_selects_no_more_than_the_cuts_may_miss(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None], check_sentence: Check
) -> None:
    settings = settings_for(calibration={})
    rows = [(mismatch if number % 2 else echo)(number) for number in range(NUM_ROWS)]
    curate(settings, rows, last=PUBLISH)
    decisions = decided(settings)
    assert check_validity(open_storage(settings), settings, "b1") >= NUM_ROWS * 0.9
    is_invalid = decisions["verdict"].is_in(["invalid_echo", "invalid_mismatch"])
    assert is_invalid.sum() >= NUM_ROWS * 0.9  # Both cuts may miss a few.
    num_selected = decisions.filter(decision="selected").height
    assert num_selected == NUM_ROWS - is_invalid.sum()
    assert metadata(instance, "validity")["valid_pairs"] == num_selected
    check_sentence(metadata(instance, "decisions")[UNREACHED_KEY]["qaq"])
    check_sentence(decisions.filter(is_invalid)["explanation"][0])
    storage = open_storage(settings)
    manifest = versions.read_manifest(storage, versions.find_version(storage, "latest").version)
    assert [(batch["rows_in"], batch["rows_selected"]) for batch in manifest["batches"]] == [(NUM_ROWS, num_selected)]


def test_a_clean_batch_loses_nothing(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None], check_sentence: Check
) -> None:
    settings = settings_for(calibration={})
    curate(settings, [clean(number) for number in range(NUM_ROWS)])
    check_validity(open_storage(settings), settings, "b1")
    decisions = decided(settings)
    assert set(decisions["verdict"]) == {"within_budget", "below_cut"}
    assert decisions.filter(decision="selected").height == NUM_ROWS / 4
    assert metadata(instance, "validity")["valid_pairs"] == NUM_ROWS
    assert metadata(instance, "validity_cuts")["warnings"] == []
    check_sentence(decisions.filter(decision="selected")["explanation"][0])


def test_a_batch_of_wrong_answers_alone_is_one_about_which_rmi_tells_nothing(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None]
) -> None:
    settings = settings_for(calibration={})
    curate(settings, [mismatch(number) for number in range(NUM_ROWS)])
    assert no_cut(settings)["mismatch"] == NoCutReason.CANNOT_TELL.value
    assert metadata(instance, "validity_cuts")["warnings"] == [untold(stored(settings, "validity_cuts").frame)]


def test_where_the_models_cannot_tell_that_is_said_and_nothing_is_a_mismatch(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None], check_sentence: Check
) -> None:
    settings = settings_for(calibration={})
    blind = Reader(is_blind=True)
    curate(settings, sixty_rows(), runtime=blind, last=SCORE)
    logged = run_job(settings, instance, SELECT, "b1", blind)
    assert untold(stored(settings, "validity_cuts").frame) in logged
    assert metadata(instance, "validity_cuts")["warnings"] == [untold(stored(settings, "validity_cuts").frame)]
    assert no_cut(settings)["mismatch"] == NoCutReason.CANNOT_TELL.value
    assert metadata(instance, "validity")["invalid_pairs"]["mismatch"] == 0
    decisions = decided(settings)
    assert "invalid_mismatch" not in set(decisions["verdict"])
    assert (decisions.slice(FIRST[cut], 5)["verdict"] == "invalid_unfinished").sum() >= 3
    assert decisions.filter(decision="selected").height == 15
    check_sentence("\n".join(metadata(instance, "validity_cuts")["signals"]))


def test_where_the_models_must_tell_the_batch_is_held_back(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None], check_sentence: Check
) -> None:
    settings = settings_for(calibration={}, gates={"must_tell": True})
    curate(settings, sixty_rows(), runtime=Reader(is_blind=True))
    decisions = decided(settings)
    assert set(decisions["decision"]) == {"batch_gated"}
    assert set(decisions["reason"]) == {GateReason.CANNOT_TELL.value}
    assert stored(settings, "selected_subset").frame.is_empty()
    assert untold(stored(settings, "validity_cuts").frame) in decisions["explanation"][0]
    check_sentence(decisions["explanation"][0])
    # Scores that tell release it.
    curate(settings, sixty_rows(), runtime=Reader(system="1"))
    assert decided(settings).filter(decision="selected").height == 15


def test_a_batch_that_is_held_back_before_scoring_is_not_judged(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None]
) -> None:
    settings = settings_for(calibration={})
    curate(settings, [{"query": "", "response": "nothing was asked"}] * 5 + [clean(1)])
    assert set(decided(settings)["decision"]) == {"batch_gated"}
    assert set(no_cut(settings).values()) == {NoCutReason.NOT_PLANTED.value}
    assert stored(settings, "validity").frame.is_empty()
    assert metadata(instance, "validity_cuts")["warnings"] == []


def test_a_flagged_signal_is_shown_and_takes_nothing_away(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None]
) -> None:
    settings = settings_for(calibration={}, validity={"mismatch": "flag", "echo": "off"})
    curate(settings, sixty_rows())
    flat = stored(settings, "validity").frame.explode("signals").unnest("signals")
    assert flat.filter(signal="mismatch")["is_raised"].sum() >= 4
    assert flat.filter(signal="echo")["evidence"].null_count() == NUM_ROWS
    assert metadata(instance, "validity")["invalid_pairs"]["mismatch"] == 0
    assert set(decided(settings).slice(FIRST[mismatch], 5)["verdict"]) <= {"within_budget", "below_cut"}


# --- cuts of other batches ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_batch_takes_the_cuts_of_the_newest_older_one_over(
    settings_for: SettingsFor, curate: Callable[..., None], check_sentence: Check
) -> None:
    settings = settings_for(calibration={})
    curate(settings, sixty_rows())
    small = [clean(100), clean(101), mismatch(102), echo(103), cut(104), invented(105), clean(106), clean(107)]
    curate(settings, small, "b2")
    own, older = stored(settings, "validity_cuts", "b2"), stored(settings, "validity_cuts")
    assert_frame_equal(own.frame, older.frame, check_exact=True)
    assert own.provenance["inputs"]["validity_cuts|b1|"] == older.data_version
    decisions = decided(settings, "b2")
    expected = [None, None, "invalid_mismatch", "invalid_echo", "invalid_unfinished", "invalid_implausible_query"]
    found = [verdict if verdict.startswith("invalid") else None for verdict in decisions["verdict"]]
    assert found == [*expected, None, None]
    check_sentence(decisions["explanation"][2])
    storage = open_storage(settings)
    assert changed_inputs(storage, "validity_cuts", "b2", PIPELINE) == []
    curate(settings, sixty_rows()[:-1])
    assert "validity_cuts|b1|" in changed_inputs(storage, "validity_cuts", "b2", PIPELINE)


@pytest.mark.slow
def test_the_lineage_of_a_small_batch_names_the_cuts_that_it_takes_over(
    settings_for: SettingsFor, curate: Callable[..., None]
) -> None:
    settings = settings_for(calibration={})
    curate(settings, sixty_rows())
    curate(settings, [clean(100), clean(101), mismatch(102)], "b2", last=PUBLISH)
    storage = open_storage(settings)
    walked = lineage.walk(storage, versions.find_version(storage, "latest").version)
    (small,) = [batch for batch in walked.batches if batch.name == "b2"]
    older = [table for table in small.tables if table.partition.batch == "b1"]
    assert [(table.name, table.state) for table in older] == [("validity_cuts", lineage.State.AS_PUBLISHED)]
    own = [table.name for table in small.tables].index("validity_cuts")
    assert small.tables[own + 1] == older[0]
    file = stored(settings, "raw_data", "b2").frame["source_file"][0]
    (path,) = trace.trace(storage, walked, f"b2/{file}:3")
    assert [row.facts for row in path.tables if row.table.name == "validity"] == [{"invalid_by": "mismatch"}]
    assert list(verify.verify(storage, walked)) == []
    Path(older[0].path).write_bytes(b"PAR1")
    alone = dataclasses.replace(walked, batches=(small,))
    assert [finding.path for finding in verify.verify(storage, alone)] == [older[0].path]


@pytest.mark.slow
def test_a_small_batch_of_other_models_takes_nothing_over(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None], check_sentence: Check
) -> None:
    settings = settings_for(calibration={})
    curate(settings, sixty_rows())
    curate(settings, [clean(100), mismatch(101)], "b2", Reader(system="1"))
    assert not [
        name for name in stored(settings, "validity_cuts", "b2").provenance["inputs"] if name.startswith("validity")
    ]
    assert set(no_cut(settings, "b2").values()) == {NoCutReason.TOO_FEW_PLANTED.value}
    assert metadata(instance, "validity")["valid_pairs"] == 2
    check_sentence("\n".join(metadata(instance, "validity_cuts")["signals"]))


@pytest.mark.slow
def test_a_reference_freezes_the_cuts_of_later_batches(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None], check_sentence: Check
) -> None:
    curate(settings_for(calibration={}), sixty_rows())
    pool = {"pool": "reference", "reference": {"name": "r1", "batches": ["b1"]}}
    settings = settings_for(calibration={}, ranking=pool)
    run_job(settings, instance, REFERENCE)
    frozen = stored(settings, CUTS, "r1")
    assert_frame_equal(frozen.frame, stored(settings, "validity_cuts").frame, check_exact=True)
    assert frozen.provenance["inputs"].keys() == {
        str(Input(name, role, "b1")) for name in ("rmi_scores", "planted_scores") for role in ("strong", "weak")
    }
    reference = stored(settings, NAME, "r1").frame
    assert reference.filter(model="strong")["invalid_by"].count() == NUM_ROWS - len(valid_pairs(settings))

    # By its own rows, this batch could not be told.
    wrong = [mismatch(number) for number in range(100, 155)] + [clean(number) for number in range(155, 160)]
    curate(settings, wrong, "b2")
    own = stored(settings, "validity_cuts", "b2")
    assert_frame_equal(own.frame, frozen.frame, check_exact=True)
    assert own.provenance["inputs"][CUTS] == frozen.data_version
    decisions = decided(settings, "b2")
    assert (decisions.head(55)["verdict"] == "invalid_mismatch").sum() >= 50
    assert not decisions.tail(5)["verdict"].str.starts_with("invalid").any()
    check_sentence(decisions["explanation"][0])

    changed = settings_for(calibration={}, ranking=pool, validity={"max_false_share": 0.1})
    with pytest.raises(dg.Failure) as error:
        run_job(changed, instance, SELECT, "b2")
    check_sentence(error.value)
    assert "give ranking.reference a new name" in str(error.value)
    with pytest.raises(dg.Failure) as error:
        run_job(changed, instance, REFERENCE)
    check_sentence(error.value)
    assert stored(settings, CUTS, "r1").data_version == frozen.data_version
    renamed = pool | {"reference": {"name": "r2", "batches": ["b1"]}}
    run_job(settings_for(calibration={}, ranking=renamed, validity={"max_false_share": 0.1}), instance, REFERENCE)


def test_a_reference_of_a_batch_without_planted_rows_is_refused(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curate: Callable[..., None], check_sentence: Check
) -> None:
    curate(settings_for(), [clean(number) for number in range(30)])
    pool = {"pool": "reference", "reference": {"name": "r1", "batches": ["b1"]}}
    with pytest.raises(dg.Failure) as error:
        run_job(settings_for(calibration={}, ranking=pool), instance, REFERENCE)
    check_sentence(error.value)
