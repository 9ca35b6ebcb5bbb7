"""Do the demo's models tell a pair from a mismatch? Matched against shuffled, for each of the three priors.

A' is the answer of another row of the same stratum of PPL(Q) (a derangement), so the two RMI differ in the answer
alone. Unpaired AUC: P(RMI of a matched pair > RMI of a shuffled one), averaged over strata; 0.5 means that the model,
the prompt or the token boundary is broken. Paired share: the same within each query, where the prior cancels; the two
together tell which side is broken.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import RecordSettings, ScoringSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.lm import causal_lm, model_files
from qaq_pipeline.lm.batching import BatchQueue
from qaq_pipeline.lm.prompts import Pair, PairEncoder
from qaq_pipeline.lm.tokenizer import load_tokenizer
from qaq_pipeline.schema.vocabularies import Quantity

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(3600)]

DATA = Path(__file__).parents[3] / "shared" / "data" / "code_alpaca_2k.json"
NUM_PAIRS = 400
NUM_STRATA = 10
PRIORS = ("null_answer", "user", "bare")


def read_pairs() -> list[Pair]:
    frame = records.read_file(DATA.read_bytes(), DATA.name, "b", RecordSettings()).frame
    accepted = frame.filter(frame["status"] == "accepted").unique("pair_id", maintain_order=True).head(NUM_PAIRS)
    return [Pair(*row) for row in accepted.select("pair_id", "system", "query", "answer").iter_rows()]


def mean_nlls(model: causal_lm.CausalLM, encoder: PairEncoder, pairs: Sequence[Pair], quantity: Quantity) -> np.ndarray:
    sequences = [sequence for pair in encoder.encode(pairs, [quantity]) for sequence in pair.sequences]
    assert len(sequences) == len(pairs)
    # A shuffled pair keeps the id of its query, and pairs are distinct: an id names one sequence.
    means: dict[str, float] = {}
    queue = BatchQueue([sequences], model.facts.batch_tokens, is_padded=model.facts.is_padded)
    while batch := queue.take():
        for sequence, (logprobs,) in zip(batch, model.score(batch), strict=True):
            means[sequence.pair_id] = -float(logprobs.mean(dtype=np.float64))
    return np.array([means[pair.pair_id] for pair in pairs])


def derangement(strata: Sequence[np.ndarray]) -> np.ndarray:
    """For each row another row of its stratum."""
    partner = np.empty(sum(len(stratum) for stratum in strata), dtype=int)
    for stratum in strata:
        order = stratum.tolist()
        random.Random(0).shuffle(order)
        partner[order] = np.roll(order, 1)
    return partner


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """P(a value of `high` > one of `low`), ties counted half."""
    difference = high[:, None] - low[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA.name} is not at hand")
@pytest.mark.parametrize(
    ("role", "floor"),
    [
        pytest.param(role, floor, id=name)
        for role, name, floor in (("strong", "smollm2-chat", 0.95), ("weak", "gemma-plain", 0.93))
    ],
)
def test_matched_pairs_score_above_shuffled_ones(role: str, floor: float, capsys: pytest.CaptureFixture[str]):
    settings = load_settings("demo")
    spec = settings.models[role]
    try:
        files = model_files.locate(spec, settings.model_cache_dir)
    except model_files.ModelNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(spec, files, settings.model_cache_dir)
    model = causal_lm.load_model(spec, files, sample_ids=tokenizer.encode_markup(causal_lm.SAMPLE_TEXT))
    pairs = read_pairs()

    def encoder(prior: str) -> PairEncoder:
        return PairEncoder(tokenizer, spec, ScoringSettings.model_validate({"prior": prior}))

    priors = {prior: mean_nlls(model, encoder(prior), pairs, Quantity.Q) for prior in PRIORS}
    strata = np.array_split(np.argsort(priors["null_answer"]), NUM_STRATA)
    partner = derangement(strata)
    shuffled = [Pair(p.pair_id, p.system, p.query, pairs[j].answer) for p, j in zip(pairs, partner, strict=True)]
    given_own = mean_nlls(model, encoder("null_answer"), pairs, Quantity.Q_GIVEN_A)
    given_other = mean_nlls(model, encoder("null_answer"), shuffled, Quantity.Q_GIVEN_A)

    rows = {}
    for prior, nll_q in priors.items():
        matched, mismatched = nll_q - given_own, nll_q - given_other
        rows[prior] = {
            "auc": round(float(np.mean([auc(matched[s], mismatched[s]) for s in strata])), 4),
            "paired": round(float((matched > mismatched).mean()), 4),
            "mean_rmi": round(float(matched.mean()), 3),
            "mean_rmi_shuffled": round(float(mismatched.mean()), 3),
        }
    with capsys.disabled():
        print(f"\n{files.name}, {spec.frame} frame, {spec.dtype}, {len(pairs)} pairs")
        for prior, row in rows.items():
            print(f"  {prior:12s} {json.dumps(row)}")
    assert rows["null_answer"]["auc"] >= floor
    assert rows["null_answer"]["paired"] > 0.95
