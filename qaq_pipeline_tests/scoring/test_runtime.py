"""runtime: configured models score pairs in one process or several; the provenance and the estimate are correct.

Tolerance: 1e-5 nats per token between one process and two, whose batches differ in shape.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoTokenizer

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lm import causal_lm, model_files
from qaq_pipeline.lm.devices import DeviceNotFoundError
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.lm.workers import MAX_TRIES
from qaq_pipeline.schema.vocabularies import NullReason, Quantity
from qaq_pipeline.scoring import logprobs, pools
from qaq_pipeline.scoring.chunk_scorer import ChunkScorer, OtherIdentityError, ScoringSpec, local_model
from qaq_pipeline.scoring.chunks import ChunkPair, Work
from qaq_pipeline.scoring.logprobs import Estimate, Progress
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.ordered_rows import OrderedRows
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.scoring.test_logprobs import assert_same_scores
from qaq_pipeline_tests.support.sentences import Check

pytestmark = pytest.mark.usefixtures("one_thread")

SettingsFor = Callable[..., Settings]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"), tmp_path / "locks")


def runtime_of(settings: Settings) -> ModelRuntime:
    return ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(
    settings_for: SettingsFor,
    storage: Storage,
    tmp_path: Path,
    twenty_samples: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logprobs, "OrderedRows", functools.partial(OrderedRows, rows_at_once=3))
    one, two = (settings_for(runtime={"pool": {"size": number}, "batch_tokens": 300}) for number in (1, 2))
    reference = runtime_of(one).score("strong", Pairs.of(twenty_samples), storage, lambda _: None)
    elsewhere = Storage(str(tmp_path / "elsewhere"), tmp_path / "locks")
    scored = runtime_of(two).score("strong", Pairs.of(twenty_samples), elsewhere, lambda _: None)
    assert len(reference.report.devices) == 1
    assert len(scored.report.devices) == min(2, len(os.sched_getaffinity(0)))
    assert list((tmp_path / "elsewhere").rglob("0.parquet")), "the rows come from files"
    assert_same_scores(scored.frame, reference.frame)


@pytest.mark.slow
def test_processes_that_are_killed_amid_a_scoring_lose_nothing(
    settings_for: SettingsFor, storage: Storage, tmp_path: Path, twenty_samples: list[Pair]
) -> None:
    one, two = (settings_for(runtime={"pool": {"size": number}, "batch_tokens": 300}) for number in (1, 2))
    reference = runtime_of(one).score("strong", Pairs.of(twenty_samples), storage, lambda _: None)
    killed: list[int] = []

    def kill(_: Progress) -> None:
        if not killed:
            killed.extend(process.pid or 0 for process in multiprocessing.active_children())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    runtime = ModelRuntime(two.models, two.scoring, two.runtime, two.model_cache_dir, kill)
    elsewhere = Storage(str(tmp_path / "elsewhere"), tmp_path / "locks")
    scored = runtime.score("strong", Pairs.of(twenty_samples), elsewhere, lambda _: None)
    assert len(killed) == 2
    assert 1 <= scored.report.num_lost_workers <= 2
    assert_same_scores(scored.frame, reference.frame)
    assert (
        runtime.score("strong", Pairs.of(twenty_samples), elsewhere, lambda _: None).report.num_scored_quantities == 0
    )


DEADLY = "f" * 32


class DeadlyScorer(ChunkScorer):
    """Ends its process over a chunk with one pair."""

    def score(self, chunk: Sequence[ChunkPair], note: Callable[[Progress], None]) -> tuple[pl.DataFrame, Work]:
        if any(one.pair.pair_id == DEADLY for one in chunk):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(chunk, note)


@pytest.mark.slow
def test_a_pair_that_ends_every_process_is_null_alone_and_tried_again_by_the_next_run(
    settings_for: SettingsFor,
    storage: Storage,
    tmp_path: Path,
    twenty_samples: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two = (settings_for(runtime={"pool": {"size": number}, "batch_tokens": 300}) for number in (1, 2))
    pairs = Pairs.of([*twenty_samples[:6], Pair(DEADLY, None, "Why?", "Because.")])
    reference = runtime_of(one).score("strong", pairs, storage, lambda _: None)
    elsewhere = Storage(str(tmp_path / "elsewhere"), tmp_path / "locks")
    with monkeypatch.context() as patch:
        patch.setattr(pools, "ChunkScorer", DeadlyScorer)
        scored = runtime_of(two).score("strong", pairs, elsewhere, lambda _: None)
    assert scored.report.num_lost_workers >= MAX_TRIES
    assert f"pair {DEADLY} is given up: 3 or more processes ended over it" in caplog.messages
    is_deadly = pl.col("pair_id") == DEADLY
    assert_same_scores(scored.frame.filter(~is_deadly), reference.frame.filter(~is_deadly))
    reasons = scored.frame.filter(is_deadly).select(f"null_reason_{quantity}" for quantity in Quantity).row(0)
    assert set(reasons) == {NullReason.WORKER_LOST.value}
    again = runtime_of(one).score("strong", pairs, elsewhere, lambda _: None)
    assert again.report.num_scored_pairs == 1
    assert_same_scores(again.frame, reference.frame)


def test_a_process_of_another_identity_is_refused(
    settings_for: SettingsFor, storage: Storage, check_sentence: Check
) -> None:
    settings = settings_for()
    model, cache = settings.models["strong"], settings.model_cache_dir
    files = model_files.locate(model, cache)
    found = local_model(model, files, cache, settings.scoring).identity
    spec = ScoringSpec(
        role="strong",
        model=model,
        files=files,
        model_cache=cache,
        scoring=settings.scoring,
        runtime=settings.runtime,
        storage=storage,
        identity=replace(found, dtype="float16"),
        scored_with={},
    )
    with pytest.raises(OtherIdentityError) as error:
        ChunkScorer(spec, functools.partial(pytest.fail, "a model was loaded"))
    check_sentence(error.value)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that this process loaded."""
    names: list[str] = []
    load = causal_lm.load_model

    def record(model: Any, files: Any, *arguments: Any, **options: Any) -> Any:
        names.append(files.name)
        return load(model, files, *arguments, **options)

    monkeypatch.setattr(causal_lm, "load_model", record)
    return names


def test_a_model_stays_loaded_until_another_one_scores(
    settings_for: SettingsFor, storage: Storage, tmp_path: Path, twenty_samples: list[Pair], loaded: list[str]
) -> None:
    runtime = runtime_of(settings_for(runtime={"pool": {"size": 1}}))
    with runtime.keeping_loaded():
        for part in (twenty_samples[:3], twenty_samples[3:6]):
            runtime.score("strong", Pairs.of(part), storage, lambda _: None)
        assert len(loaded) == 1
        runtime.score("weak", Pairs.of(twenty_samples[:3]), storage, lambda _: None)
        kept = runtime.score("strong", Pairs.of(twenty_samples[:8]), storage, lambda _: None)
        assert len(loaded) == 3
    elsewhere = Storage(str(tmp_path / "elsewhere"), tmp_path / "locks")
    alone = runtime.score("strong", Pairs.of(twenty_samples[:8]), elsewhere, lambda _: None)
    assert len(loaded) == 4
    assert_same_scores(kept.frame, alone.frame)


def test_a_scoring_that_failed_leaves_no_worker_to_the_next_one(
    settings_for: SettingsFor, storage: Storage, twenty_samples: list[Pair], loaded: list[str]
) -> None:
    def fail(progress: Progress) -> None:
        raise RuntimeError(progress.model)

    settings = settings_for(runtime={"pool": {"size": 1}, "batch_tokens": 200})
    runtime = ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir, fail)
    with runtime.keeping_loaded():
        for number in (1, 2):
            with pytest.raises(RuntimeError, match="strong"):
                runtime.score("strong", Pairs.of(twenty_samples), storage, lambda _: None)
            assert len(loaded) == number


def with_added_tokens(source: Path, folder: Path) -> Path:
    """A copy of the tiny model whose tokenizer has more tokens than the model embeddings; `<think>` is beyond them."""
    copied = shutil.copytree(source, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens([*(f"<unused{number}>" for number in range(60)), "<think>"])
    tokenizer.save_pretrained(copied)
    return folder


def test_a_token_beyond_the_embedding_costs_its_pair_and_is_a_warning(
    settings_for: SettingsFor,
    storage: Storage,
    tmp_path: Path,
    twenty_samples: list[Pair],
    tiny_model_dir: Callable[..., Path],
) -> None:
    folder = with_added_tokens(tiny_model_dir(), tmp_path / "more")
    runtime = runtime_of(settings_for(strong={"directory": str(folder)}))
    pairs = [*twenty_samples[:3], Pair("f" * 32, None, "Why <think>?", "Because.")]
    scored = runtime.score("strong", Pairs.of(pairs), storage, lambda _: None)
    for quantity in Quantity:
        reasons = scored.frame[f"null_reason_{quantity}"].to_list()
        assert reasons == [None, None, None, NullReason.TOKEN_BEYOND_EMBEDDING]
    (warning,) = scored.provenance["warnings"]
    assert "has 322 tokens, the model 300 embeddings" in warning
    assert runtime.score("weak", Pairs.of(pairs), storage, lambda _: None).provenance["warnings"] == []


def test_the_provenance_states_what_the_scores_rest_on(
    settings_for: SettingsFor, storage: Storage, twenty_samples: list[Pair]
) -> None:
    settings = settings_for(scoring={"prior": "user"})
    provenance = runtime_of(settings).score("weak", Pairs.of(twenty_samples[:2]), storage, lambda _: None).provenance
    identity = ScoreIdentity(**provenance["identity"])
    assert (identity.prior, identity.dtype, identity.max_tokens) == ("user", "float32", settings.scoring.max_tokens)
    assert provenance["identity_hash"] == identity.digest()
    assert provenance["scoring"] == {
        "prior": "user",
        "invalid_clause": True,
        "max_tokens": settings.scoring.max_tokens,
        "too_long": "truncate_answer",
    }
    (scorer,) = provenance["scored_with"]
    assert (scorer["device"], sorted(scorer["libraries"])) == ("cpu", ["tokenizers", "torch", "transformers"])
    assert "identity_after" not in provenance


def test_where_the_models_files_change_meanwhile_both_identities_are_stated_and_nothing_is_cached(
    settings_for: SettingsFor, storage: Storage, twenty_samples: list[Pair], tmp_path: Path
) -> None:
    source = Path(str(settings_for().models["strong"].directory))
    shutil.copytree(source, model := tmp_path / "model")
    settings = settings_for(strong={"directory": str(model)})

    def change(_: Estimate) -> None:
        config = model / "config.json"
        config.write_text(config.read_text() + "\n")

    scored = runtime_of(settings).score("strong", Pairs.of(twenty_samples[:2]), storage, lambda _: None, change)
    before, after = scored.provenance["identity"], scored.provenance["identity_after"]
    assert {name for name in before if before[name] != after[name]} == {"revision"}
    assert scored.frame.height == 2
    assert not storage.files.exists("score_cache")


def test_the_estimate_counts_what_the_scoring_then_computes(
    settings_for: SettingsFor, storage: Storage, twenty_samples: list[Pair]
) -> None:
    runtime = runtime_of(settings_for())
    runtime.score("strong", Pairs.of(twenty_samples[:5]), storage, lambda _: None)
    cost = runtime.estimate("strong", Pairs.of(twenty_samples), storage)
    report = runtime.score("strong", Pairs.of(twenty_samples), storage, lambda _: None).report
    assert (cost.role, cost.device, cost.num_pairs) == ("strong", "cpu", 20)
    estimate = cost.estimate
    assert (cost.num_cached, estimate.num_sequences, estimate.num_tokens) == (
        25,
        report.num_sequences,
        report.num_tokens,
    )
    assert 0 < cost.num_shared_tokens < estimate.num_tokens
    assert estimate.flops > 0
    assert estimate.seconds > 0
    assert runtime.estimate("strong", Pairs.of(twenty_samples), storage).estimate.seconds == 0.0


@pytest.mark.parametrize("submits", [True, False])
def test_a_command_that_submits_its_runs_needs_no_device_of_the_models(
    settings_for: SettingsFor, submits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    address = {"submit_to": "http://127.0.0.1:3000"} if submits else {}
    runtime = runtime_of(settings_for(strong={"device": "cuda", "dtype": "mixed"}, runtime=address))
    if submits:
        assert runtime.identity("strong").dtype == "mixed"
    else:
        with pytest.raises(DeviceNotFoundError, match="this machine has no device 'cuda'"):
            runtime.identity("strong")
