"""identity: the digest that names the folders of the score cache."""

from __future__ import annotations

from qaq_pipeline.storage.identity import ScoreIdentity

DEMO = ScoreIdentity(
    model="SmolLM2-135M-Instruct.Q4_1.gguf",
    revision="gguf:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    tokenizer_hash="49d19107026e7a5d",
    template_hash="7a2b98f9a7c61511",
    prior="null_answer",
    dtype="bfloat16",
    max_tokens=2048,
    too_long="truncate_answer",
)
"""The identity of the demo's strong model, as stored in the score cache of a curated home."""


def test_the_digest_of_an_identity_stays_the_same_so_that_nothing_is_scored_again() -> None:
    assert DEMO.digest() == "ce689b9fc26df72a7b5cd1c7870bd0ba"
