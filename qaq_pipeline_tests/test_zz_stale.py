import polars as pl
from qaq_pipeline import schema
from qaq_pipeline_tests.test_scoring import *


def test_it(settings_for, scorings, twenty_samples):
    rows = [
        {
            "pair_id": twenty_samples[0].pair_id,
            "quantity": "q",
            "sum_nll": 1e-6,
            "num_tokens": 999,
            "null_reason": None,
            "token_logprobs": None,
        }
    ]
    scorings.storage.append_scores(
        scorings.model(settings_for()).identity, pl.DataFrame(rows, schema=schema.dtypes(schema.CachedScores))
    )
    for _ in range(3):
        _, r = scorings(twenty_samples[:2])
        print(r.num_cached_quantities, r.num_scored_quantities)
