"""The models of the settings, ready to score pairs: loaded once, with their identity.

Belongs here: from settings to a scoring. Does not belong here: how a batch is scored (`lm`), and the score cache
(`logprobs`).
"""

import functools
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import ModelSettings, Settings
from qaq_pipeline.lm import model_files
from qaq_pipeline.lm.prompts import Pair, PairEncoder
from qaq_pipeline.scoring.logprobs import Estimate, Progress, ScoringModel, ScoringReport, plan_scoring, score_pairs
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Storage

SCORING_LIBRARIES = ("torch", "transformers", "tokenizers")
LIBRARIES = (*SCORING_LIBRARIES, "polars", "dagster")


@dataclass(frozen=True)
class ScoringCost:
    """What scoring some pairs under one model would take on this machine."""

    role: str
    model: str
    device: str
    num_pairs: int
    num_cached: int
    """Quantities that the score cache has."""
    num_sequences: int
    num_tokens: int
    num_shared_tokens: int
    """Of these, tokens of shared prefixes."""
    flops: float
    peak_flops_per_second: float
    seconds: float


@dataclass(frozen=True)
class _PreparedModel:
    model: ModelSettings
    files: model_files.ModelFiles
    encoder: PairEncoder
    identity: ScoreIdentity
    sample_ids: Sequence[int]
    """Of an ordinary text, for the self-test of each process."""


@dataclass(frozen=True)
class ScoredPairs:
    """A Logprobs frame, what its scoring took, and what it rests on."""

    frame: pl.DataFrame
    report: ScoringReport
    provenance: dict[str, Any]


class ModelRuntime:
    """Scores pairs under a model of the settings. torch and transformers load on first use.

    Args:
        settings: models, prompts, window.
        on_progress: called after every batch.
    """

    def __init__(self, settings: Settings, on_progress: Callable[[Progress], None] = lambda _: None) -> None:
        self._settings = settings
        self._on_progress = on_progress

    def score(
        self,
        role: str,
        pairs: Sequence[Pair],
        storage: Storage,
        on_shard: Callable[[Progress], None],
        on_start: Callable[[Estimate], None] = lambda _: None,
    ) -> ScoredPairs:
        """The Logprobs of the pairs under the model of that role; the cache spares what was scored before.

        Where the model's files changed meanwhile, `identity_after` stands in the provenance, by which the batch is
        gated, and what was scored since then is not cached: it may be of either model.

        Raises:
            model_files.ModelNotFoundError: the model's files cannot be had.
            causal_lm.UnsupportedModelError: the model cannot be scored right.
            prompts.TemplateUnusableError: its chat template cannot carry the passes.
        """
        from qaq_pipeline.lm import causal_lm, devices

        settings, prepared = self._settings, self._prepare(role)
        model, files, encoder, identity = prepared.model, prepared.files, prepared.encoder, prepared.identity
        loads = functools.partial(
            causal_lm.loaders, model, files, settings.scoring.max_tokens, sample_ids=prepared.sample_ids
        )
        watch = model_files.FilesWatch(files)
        scored_with = {
            "libraries": {name: importlib.metadata.version(name) for name in SCORING_LIBRARIES},
            "device": devices.resolve_device(model.device).type,
        }
        frame, report = score_pairs(
            pairs,
            ScoringModel(role, encoder, identity, loads, files.num_weight_bytes(), scored_with, watch.is_unchanged),
            storage,
            settings.scoring,
            settings.runtime,
            on_start=on_start,
            on_progress=self._on_progress,
            on_shard=on_shard,
        )
        is_changed = report.num_scored_quantities > 0 and not watch.is_unchanged()
        provenance = {
            "identity": asdict(identity),
            **({"identity_after": asdict(identity) | {"revision": watch.found}} if is_changed else {}),
            "identity_hash": identity.digest(),
            "frame": model.frame,
            "scoring": settings.scoring.model_dump(mode="json", exclude={"quantities", "token_logprobs"}),
            "template": json.loads(encoder.template_text()),
            "scored_with": list(report.scored_with),
        }
        return ScoredPairs(frame, report, provenance)

    def estimate(self, role: str, pairs: Sequence[Pair], storage: Storage) -> ScoringCost:
        """What scoring the pairs under the model of that role would take: every pair is tokenised, no weights loaded.

        Raises:
            Exception: as `score`.
        """
        from qaq_pipeline.lm import causal_lm, devices

        prepared = self._prepare(role)
        plan = plan_scoring(pairs, prepared.encoder, prepared.identity, storage, self._settings.scoring)
        for _ in plan.windows():
            pass
        device = devices.resolve_device(prepared.model.device)
        facts = causal_lm.unloaded_facts(prepared.files, devices.resolve_dtype(prepared.model.dtype, device), device)
        estimate = Estimate.of(plan, [facts])
        return ScoringCost(
            role=role,
            model=prepared.files.name,
            device=device.type,
            num_pairs=len(pairs),
            num_cached=plan.num_cached,
            num_sequences=plan.num_sequences,
            num_tokens=plan.num_tokens,
            num_shared_tokens=plan.num_shared_tokens,
            flops=estimate.flops,
            peak_flops_per_second=facts.peak_flops_per_second,
            seconds=estimate.seconds if plan.num_sequences else 0.0,
        )

    def _prepare(self, role: str) -> _PreparedModel:
        from qaq_pipeline.lm import causal_lm, devices
        from qaq_pipeline.lm.tokenizer import load_tokenizer

        settings, model = self._settings, self._settings.models[role]
        files = model_files.locate(model, settings.model_cache_dir)
        tokenizer = load_tokenizer(model, files, settings.model_cache_dir)
        encoder = PairEncoder(tokenizer, model, settings.scoring)
        device = devices.resolve_device(model.device)
        dtype = str(devices.resolve_dtype(model.dtype, device)).removeprefix("torch.")
        sample_ids = tokenizer.encode_markup(causal_lm.SAMPLE_TEXT)
        return _PreparedModel(model, files, encoder, self._identity(files, encoder, dtype), sample_ids)

    def _identity(self, files: model_files.ModelFiles, encoder: PairEncoder, dtype: str) -> ScoreIdentity:
        scoring = self._settings.scoring
        return ScoreIdentity(
            model=files.name,
            revision=files.revision,
            tokenizer_hash=files.tokenizer_hash(),
            template_hash=encoder.template_hash(),
            prior=scoring.prior,
            dtype=dtype,
            max_tokens=scoring.max_tokens,
            too_long=scoring.too_long,
            token_logprobs=scoring.token_logprobs,
        )
