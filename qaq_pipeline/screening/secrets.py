"""Secrets in a text: keys and tokens that services issue, and private keys.

Belongs here: what is taken for a secret, and where in a text it is. Does not belong here: what happens to such a row
(`screen`). A secret itself never leaves this module: it returns kinds and places.

The patterns are those of detect-secrets, of formats that a service gives to its own keys. Entropy, and a variable that
is called a password, are not evidence: code is full of both. No secret is tried out: nothing is sent anywhere.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import polars as pl

_DETECTORS = {
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "jwt": "JwtTokenDetector",
    "mailchimp": "MailchimpDetector",
    "npm": "NpmDetector",
    "openai": "OpenAIDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
"""By module of detect_secrets.plugins."""

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\w-]+: [^\n]*\n|\s|\\n)*[A-Za-z0-9+/=\n\\]{100}"
)
"""A private key with its body: the line alone, as programs compare with it, is no secret."""
_PLACEHOLDER = re.compile(r"example|sample|dummy|placeholder|your|x{5}|\*{3}|\.{3}|<|12345678|abcdefgh", re.IGNORECASE)
_FEWEST_CHARACTERS = 8
"""A key of fewer different characters is a placeholder, such as 40 zeros."""


class Secret(NamedTuple):
    """A secret in a text."""

    kind: str
    place: int
    """Its first character, counted from 1."""


def find(text: str) -> Iterator[Secret]:
    """The secrets in a text, kind by kind."""
    for found in _PRIVATE_KEY.finditer(text):
        yield Secret("Private Key", found.start() + 1)
    for kind, patterns, is_valid in _detectors():
        for pattern in patterns:
            for found in pattern.finditer(text):
                secret = next(filter(None, found.groups()), found[0]) if pattern.groups else found[0]
                if not _is_placeholder(found[0]) and is_valid(secret):
                    yield Secret(kind, found.start() + 1)


def may_have(text: pl.Expr) -> pl.Expr:
    """Whether a text may have a secret: true wherever `find` finds one, and quick."""
    return text.str.contains(_ANY)


_ANY = "|".join(
    (
        "PRIVATE KEY",
        r"A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA|(?i:aws.{0,40}[0-9a-zA-Z/+]{40})",
        "AccountKey=",
        r"[MNO][a-zA-Z\d_-]{23,25}\.[a-zA-Z\d_-]{6}\.",
        "gh[pousr]_",
        "gl[a-z]{2,5}-|GR1348941",
        "eyJ",
        "-us[0-9]",
        ":_authToken",
        "T3BlbkFJ",
        "pypi-Ag",
        r"SG\.",
        r"(?i:xox[abposr]-|hooks\.slack\.com)",
        "sq0csp-",
        "[rs]k_live_",
        r"\d{8,10}:[0-9A-Za-z_-]{35}",
        "(?:AC|SK)[a-z0-9]{32}",
    )
)
"""A part of every pattern."""


def _is_placeholder(secret: str) -> bool:
    return _PLACEHOLDER.search(secret) is not None or len(set(secret)) < _FEWEST_CHARACTERS


@functools.cache
def _detectors() -> list[tuple[str, list[re.Pattern[str]], Callable[[str], bool]]]:
    """Kind, patterns, and the test of a match, of each detector."""
    found = []
    for module, name in _DETECTORS.items():
        plugin = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)()
        is_valid = getattr(plugin, "is_formally_valid", lambda _: True)
        found.append((plugin.secret_type, list(plugin.denylist), is_valid))
    return found
