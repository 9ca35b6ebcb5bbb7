"""Scores pairs under a configured model: locates its files, identifies it, and loads it only if necessary.

Belongs here: the step from the settings of a model to a scoring, its provenance and its estimated cost.
Does not belong here: how a batch is scored (`lm`), and the use of the score cache (`logprobs`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import ModelSettings, RuntimeSettings, ScoringSettings
from qaq_pipeline.lm import model_files
from qaq_pipeline.scoring.chunk_scorer import ScoringSpec, local_model
from qaq_pipeline.scoring.logprobs import Estimate, Progress, ScoringModel, ScoringReport, plan_scoring, score_pairs
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.pools import Opened, pool_of, unloaded_facts_here
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.ordered_rows import Rows
from qaq_pipeline.storage.storage import Storage


@dataclass(frozen=True)
class ScoringCost:
    """The estimated cost of scoring some pairs under one model on this machine."""

    role: str
    model: str
    device: str
    num_pairs: int
    num_cached: int
    """Quantities found in the score cache."""
    num_shared_tokens: int
    """The part of the tokens that lies in shared prefixes."""
    peak_flops_per_second: float
    estimate: Estimate


@dataclass(frozen=True)
class ScoredPairs:
    """The rows of Logprobs, the report of their scoring, and their provenance."""

    rows: Rows
    report: ScoringReport
    provenance: dict[str, Any]

    @property
    def frame(self) -> pl.DataFrame:
        """All rows. Of many, read parts."""
        return pl.concat(self.rows.parts())


_Revision = tuple[str, ...]
"""Role and revision of a model; of workers that are kept, also the storage that they write to."""
_Open = Callable[[int], AbstractContextManager[Opened]]
"""Loads a model in this process, or in at most the given number of scoring processes."""


class _KeptWorkers:
    """The workers of the model that scored last."""

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._workers: Opened | None = None
        self._revision: _Revision | None = None
        self._limit = 0

    def get(self, revision: _Revision, open_: _Open, limit: int) -> Opened:
        """The workers that were kept, if they are of this model and not fewer than is worth while; else new ones."""
        if self._workers is None or self._revision != revision or self._limit < limit:
            self.close()
            self._workers = self._resources.enter_context(open_(limit))
            self._revision, self._limit = revision, limit
        return self._workers

    def close(self) -> None:
        """End the workers and free their devices."""
        self._workers = None
        self._resources.close()


class ModelRuntime:
    """Scores pairs under one of the configured models. torch and transformers load on first use.

    Args:
        models: settings of each model, by role.
        scoring: prior, wanted quantities, window.
        runtime: batch and shard size, processes.
        model_cache: folder of local and converted models.
        on_progress: called after every batch.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSettings],
        scoring: ScoringSettings,
        runtime: RuntimeSettings,
        model_cache: Path,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._models = models
        self._scoring = scoring
        self._runtime = runtime
        self._model_cache = model_cache
        self._pool = pool_of(runtime)
        self._on_progress = on_progress
        self._described: dict[_Revision, ScoringModel] = {}
        self._kept: _KeptWorkers | None = None
        """None: a model is loaded for one scoring."""

    def score(
        self,
        role: str,
        pairs: Pairs,
        storage: Storage,
        on_shard: Callable[[Progress], None],
        on_start: Callable[[Estimate], None] = lambda _: None,
    ) -> ScoredPairs:
        """The rows of Logprobs of the pairs under the model of that role. Cached quantities are not scored again.

        If the model's files change during the scoring, the provenance contains `identity_after`, which fails the
        batch's gate. Scores made after the change are not cached, since either model may have made them.

        Raises:
            ModelError: the model's files are missing or cannot be read, it cannot be scored correctly, or the prompts
                cannot be expressed for it.
        """
        files, model = self._prepare(role)
        watch = model_files.FilesWatch(files)
        rows, report = score_pairs(
            pairs,
            replace(model, is_identity_true=watch.is_unchanged),
            storage,
            self._scoring,
            self._runtime,
            on_start=on_start,
            on_progress=self._on_progress,
            on_shard=on_shard,
        )
        identity = asdict(model.identity)
        provenance = {
            "identity": identity,
            "identity_hash": model.identity.digest(),
            "frame": self._models[role].frame,
            "scoring": self._scoring.model_dump(mode="json", exclude={"quantities"}),
            "template": json.loads(model.encoder.template_text()),
            "end_ids": list(model.encoder.end_ids()),
            "scored_with": list(report.scored_with),
            "warnings": list(model.warnings),
        }
        if report.num_scored_quantities and not watch.is_unchanged():
            provenance["identity_after"] = identity | {"revision": watch.found}
        return ScoredPairs(rows, report, provenance)

    def identity(self, role: str) -> ScoreIdentity:
        """The identity of the scores that the model would give now. No weights are loaded; a hub model is downloaded.

        Raises:
            ModelError: it cannot be used.
        """
        return self._prepare(role)[1].identity

    def estimate(self, role: str, pairs: Pairs, storage: Storage) -> ScoringCost:
        """The cost of scoring the pairs under the model of that role. It tokenises every pair, but loads no weights.

        Raises:
            Exception: as `score`.
        """
        files, model = self._prepare(role)
        plan = plan_scoring(pairs, model.encoder, model.identity, storage, self._scoring)
        for _ in plan.windows():
            pass
        unloaded = functools.partial(unloaded_facts_here, self._model_cache)
        device, facts = self._pool.on_worker(unloaded, self._models[role])
        return ScoringCost(
            role=role,
            model=files.name,
            device=device,
            num_pairs=plan.num_pairs,
            num_cached=plan.num_cached,
            num_shared_tokens=plan.num_shared_tokens,
            peak_flops_per_second=facts.peak_flops_per_second,
            estimate=Estimate.of(plan, [facts]),
        )

    @contextmanager
    def keeping_loaded(self) -> Iterator[None]:
        """Within it, a model stays loaded, and its device held, until another model scores."""
        self._kept = _KeptWorkers()
        try:
            yield
        finally:
            self._kept.close()
            self._kept = None

    @contextmanager
    def _open_workers(
        self, spec_of: Callable[..., ScoringSpec], sample_ids: Sequence[int], limit: int, storage: Storage
    ) -> Iterator[Opened]:
        spec, kept = spec_of(storage=storage), self._kept
        open_ = functools.partial(self._pool.open, spec, sample_ids)
        if kept is None:
            with open_(limit) as workers:
                yield workers
            return
        try:
            yield kept.get((spec.role, spec.files.revision, storage.files.url()), open_, limit)
        except BaseException:
            kept.close()  # A queue may not have been run to its end.
            raise

    def _prepare(self, role: str) -> tuple[model_files.ModelFiles, ScoringModel]:
        """The model's files, and the model as it is before its weights are loaded: the same while its files are."""
        files = model_files.locate(self._models[role], self._model_cache)
        if (role, files.revision) not in self._described:
            self._described[role, files.revision] = self._describe(role, files)
        return files, self._described[role, files.revision]

    def _describe(self, role: str, files: model_files.ModelFiles) -> ScoringModel:
        from qaq_pipeline.lm import causal_lm
        from qaq_pipeline.lm.tokenizer import warnings

        model = self._models[role]
        local = local_model(self._pool.local(model), files, self._model_cache, self._scoring)
        dtype, scored_with = self._pool.kind(model)
        identity = replace(local.identity, dtype=dtype)  # Each worker compares its own with it.
        spec_of = functools.partial(
            ScoringSpec,
            role=role,
            model=model,
            files=files,
            model_cache=self._model_cache,
            scoring=self._scoring,
            runtime=self._runtime,
            identity=identity,
            scored_with=scored_with,
        )
        sample_ids = local.tokenizer.encode_markup(causal_lm.SAMPLE_TEXT)
        return ScoringModel(
            role=role,
            encoder=local.encoder,
            identity=identity,
            open_workers=functools.partial(self._open_workers, spec_of, sample_ids),
            num_weight_bytes=files.num_weight_bytes(),
            scored_with=scored_with,
            warnings=warnings(model, files, local.tokenizer, local.encoder),
        )
