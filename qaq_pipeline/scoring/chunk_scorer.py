"""What a scoring process does with a chunk: encode, score, store shards, and return a table and counts.

Belongs here: the state of such a process, and the check that it scores under the identity of the run. Does not belong
here: the processes (`lm.workers`), and the choice of chunks (`chunks`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from qaq_pipeline.config.settings import ModelSettings, RuntimeSettings, ScoringSettings
from qaq_pipeline.lm.model_files import FilesWatch, ModelFiles
from qaq_pipeline.lm.prompts import PairEncoder
from qaq_pipeline.lm.workers import Load
from qaq_pipeline.scoring.chunks import ChunkPair, Work, plan_of
from qaq_pipeline.scoring.logprobs import Progress, Run, ScoringModel
from qaq_pipeline.scoring.planner import wanted_quantities
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Storage

if TYPE_CHECKING:
    from qaq_pipeline.lm.tokenizer import HfTokenizer


class OtherIdentityError(RuntimeError):
    """A scoring process would give scores of another identity than the run. The text names the fields."""


@dataclass(frozen=True)
class ScoringSpec:
    """Everything that a process needs to score under a model, apart from its weights."""

    role: str
    model: ModelSettings
    files: ModelFiles
    model_cache: Path
    scoring: ScoringSettings
    runtime: RuntimeSettings
    storage: Storage
    identity: ScoreIdentity
    """Under which its scores are cached."""
    scored_with: Mapping[str, Any]


@dataclass(frozen=True)
class LocalModel:
    """A model as it is on this machine, before its weights are loaded."""

    tokenizer: HfTokenizer
    encoder: PairEncoder
    identity: ScoreIdentity
    """Of the scores that it would give here."""


def local_model(model: ModelSettings, files: ModelFiles, model_cache: Path, scoring: ScoringSettings) -> LocalModel:
    """The model on this machine.

    Raises:
        ModelError: it cannot be used.
    """
    from qaq_pipeline.lm import devices
    from qaq_pipeline.lm.tokenizer import load_tokenizer

    num_embeddings = files.num_embeddings()  # First, since a tokenizer reads the config too.
    tokenizer = load_tokenizer(model, files, model_cache)
    encoder = PairEncoder(tokenizer, model, scoring, num_embeddings)
    dtype = devices.resolve_dtype(model.dtype, devices.resolve_device(model.device))
    identity = ScoreIdentity(
        model=files.name,
        revision=files.revision,
        tokenizer_hash=files.tokenizer_hash(),
        template_hash=encoder.template_hash(),
        prior=scoring.prior,
        dtype=dtype,
        max_tokens=scoring.max_tokens,
        too_long=scoring.too_long,
    )
    return LocalModel(tokenizer, encoder, identity)


class ChunkScorer:
    """Scores chunks in this process.

    Args:
        spec: of the scoring.
        load: returns the model.

    Raises:
        OtherIdentityError: this process would give other scores.
    """

    def __init__(self, spec: ScoringSpec, load: Load) -> None:
        local = local_model(spec.model, spec.files, spec.model_cache, spec.scoring)
        _require_same(local.identity, spec.identity)
        self._encoder = local.encoder
        self._spec = spec
        self._scorer = load()
        self._watch = FilesWatch(spec.files)
        self.facts = self._scorer.facts

    def score(self, chunk: Sequence[ChunkPair], note: Callable[[Progress], None]) -> tuple[pl.DataFrame, Work]:
        """The Logprobs table of a chunk, and what was done for it. Shards are stored on the way."""
        spec = self._spec
        model = ScoringModel(
            role=spec.role,
            encoder=self._encoder,
            identity=spec.identity,
            open_workers=lambda *_: contextlib.nullcontext(self._scorer),
            scored_with=spec.scored_with,
            is_identity_true=self._watch.is_unchanged,
        )
        plan = plan_of(chunk, self._encoder, wanted_quantities(spec.scoring))
        share = min(one.batch_share for one in chunk)
        run = Run(plan, model, spec.storage, spec.runtime, on_progress=note, batch_share=share)
        return pl.concat(run.score().parts()), run.work


def _require_same(found: ScoreIdentity, wanted: ScoreIdentity) -> None:
    here, there = asdict(found), asdict(wanted)
    other = [f"{name}: {here[name]}, not {there[name]}" for name in there if here[name] != there[name]]
    if other:
        raise OtherIdentityError(
            f"a scoring process would give scores of another identity ({'; '.join(other)}); give every process the "
            "same files, settings and kind of device, or set `dtype`"
        )
