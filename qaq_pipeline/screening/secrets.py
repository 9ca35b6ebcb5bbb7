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

import polars as pl

from qaq_pipeline.screening.finding import Finding

_DETECTORS = {
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "jwt": "JwtTokenDetector",
    "mailchimp": "MailchimpDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
"""By module of detect_secrets.plugins."""

_OTHERS = {
    "Anthropic Key": r"sk-ant-[A-Za-z0-9_-]{80,120}",
    "GitHub Token": r"github_pat_[A-Za-z0-9_]{82}",
    "Google API Key": r"AIza[A-Za-z0-9_-]{35}",
    "Hugging Face Token": r"hf_[A-Za-z0-9]{34}",
    "NPM tokens": r"/:_authToken=\s{0,9}(?:npm_[A-Za-z0-9]{36}|[A-Fa-f0-9-]{36})",
    "OpenAI Token": r"sk-[A-Za-z0-9_-]{0,60}[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9_-]{20,80}",
}
"""Formats that detect-secrets does not know, or whose pattern there takes too long on a long line."""

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:\s|\\[nrt]|[A-Za-z-]{4,20}: [^\n\\]{0,200}){0,40}(?P<body>(?:[A-Za-z0-9+/=]|\s|\\[nrt]){60})"
)
"""A private key with its body: the line alone, as programs compare with it, is no secret."""
_PLACEHOLDER = re.compile(
    r"example|sample|dummy|placeholder|your|x{5}|\*{3}|\.{3}|<|12345678|abcdefgh|eyJzdWIiOiIxMjM0NTY3ODkwIi",
    re.IGNORECASE,
)
"""The last one is the token that jwt.io shows."""
_FEWEST_CHARACTERS = 8
"""A key of fewer different characters is a placeholder, such as 40 zeros."""
_IN_A_WORD = re.compile(r"[A-Za-z0-9_-]")


def find(text: str) -> Iterator[Finding]:
    """The secrets in a text, kind by kind."""
    for found in _PRIVATE_KEY.finditer(text):
        if not _is_placeholder(found["body"]):
            yield Finding("Private Key", found.start() + 1)
    for kind, patterns, is_valid in _detectors():
        for pattern in patterns:
            for found in pattern.finditer(text):
                if not _is_placeholder(found[0]) and is_valid(text, found):
                    yield Finding(kind, found.start() + 1)


def may_have(text: pl.Expr) -> pl.Expr:
    """Whether a text may have a secret: true wherever `find` finds one, and quick."""
    return text.str.contains(_ANY)


_ANY = "|".join(
    (
        "PRIVATE KEY",
        r"A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA|(?i:aws.{0,60}[0-9a-zA-Z/+]{40})",
        "AccountKey=",
        r"[MNO][a-zA-Z\d_-]{23,25}\.[a-zA-Z\d_-]{6}\.",
        "gh[pousr]_|github_pat_|sk-ant-|AIza|hf_[A-Za-z0-9]{34}",
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


IsValid = Callable[[str, re.Match[str]], bool]


@functools.cache
def _detectors() -> list[tuple[str, list[re.Pattern[str]], IsValid]]:
    """Kind, patterns, and the test of a match, of each detector."""
    found: list[tuple[str, list[re.Pattern[str]], IsValid]] = []
    for module, name in _DETECTORS.items():
        plugin = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)()
        is_valid: IsValid = _is_alone
        if hasattr(plugin, "is_formally_valid"):
            is_valid = functools.partial(_is_formally_valid, plugin.is_formally_valid)
        found.append((plugin.secret_type, list(plugin.denylist), is_valid))
    return found + [(kind, [re.compile(pattern)], _is_alone) for kind, pattern in _OTHERS.items()]


def _is_alone(text: str, found: re.Match[str]) -> bool:
    """Whether the match is no part of a longer word, and no dotted name, as those of programs are, without digits."""
    around = text[max(found.start() - 1, 0) : found.start()] + text[found.end() : found.end() + 1]
    is_word = _IN_A_WORD.match(found[0][0]) is not None
    is_name = "." in found[0] and not any(character.isdigit() for character in found[0])
    return not is_name and not (is_word and _IN_A_WORD.search(around))


def _is_formally_valid(check: Callable[[str], bool], _: str, found: re.Match[str]) -> bool:
    try:
        return check(found[0])
    except RecursionError:  # A token of JSON that is nested too deep is none.
        return False
