"""The identity of a score: the key of the score cache, stored with every table that depends on it.

Belongs here: the fields of the identity and its hash. Does not belong here: how the fields are determined.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qaq_pipeline.storage.files import hash_json

ENGINE = "transformers-body-and-head"
ENGINE_VERSION = "2"


@dataclass(frozen=True, slots=True)
class ScoreIdentity:
    """The inputs of a score: two scores of a pair with equal identities agree within the stated tolerance.

    Library versions and the device are stored separately, so an upgrade alone rescores nothing.
    """

    model: str
    revision: str
    """Commit of a hub model, else the hash of the model's files."""
    tokenizer_hash: str
    template_hash: str
    """Hash of the rendered prompts, with their version, frame and prior."""
    prior: str
    dtype: str
    max_tokens: int
    too_long: str
    engine: str = ENGINE
    engine_version: str = ENGINE_VERSION

    def digest(self) -> str:
        """Hash of all fields (32 hex digits): names the folder of the score cache."""
        # The constant is part of every existing digest: without it, no cached score would be found.
        return hash_json(asdict(self) | {"token_logprobs": False})
