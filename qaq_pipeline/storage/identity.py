"""What makes a score what it is: the key of the score cache, stored with every table that rests on it.

Belongs here: the fields of that identity and its hash. Does not belong here: how the fields are found out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

ENGINE = "transformers-body-and-head"
ENGINE_VERSION = "2"


@dataclass(frozen=True, slots=True)
class ScoreIdentity:
    """Two scores of one pair are the same number, within the stated tolerance, if their identities are equal.

    Library versions and the device are stored beside it, outside: an upgrade alone rescores nothing.
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
        # The constant is part of the digest of every score in a cache: without it, none of them would be found.
        fields = json.dumps(dataclasses.asdict(self) | {"token_logprobs": False}, sort_keys=True)
        return hashlib.blake2b(fields.encode(), digest_size=16).hexdigest()
