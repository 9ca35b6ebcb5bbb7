"""secrets: what is found, what is no secret, and that nothing of a secret is returned."""

from __future__ import annotations

import random
import string
import time
from pathlib import Path

import polars as pl
import pytest

from qaq_pipeline.config.settings import RecordSettings
from qaq_pipeline.ingest.records import read_file
from qaq_pipeline.screening import secrets

LETTERS = string.ascii_letters + string.digits
HEX = "0123456789abcdef"
HEAD = "-----BEGIN RSA PRIVATE KEY-----"
BODY = "MIIEpAIBAAKCAQEA"


def made(length: int, alphabet: str = LETTERS, seed: int = 0) -> str:
    """A key that no service gave to anybody."""
    return "".join(random.Random(seed).choices(alphabet, k=length))


KINDS = {
    "Anthropic Key": "sk-ant-" + made(93),
    "Google API Key": "AIza" + made(35),
    "Hugging Face Token": "hf_" + made(34),
    "AWS Access Key": "AKIA" + made(16, string.ascii_uppercase + "234567"),
    "Azure Storage Account access key": f"AccountName=a;AccountKey={made(86)}==",
    "GitHub Token": "ghp_" + made(36),
    "GitLab Token": "glpat-" + made(20),
    "Mailchimp Access Key": made(32, HEX) + "-us7",
    "NPM tokens": f"//registry.npmjs.org/:_authToken=npm_{made(36)}",
    "OpenAI Token": f"sk-{made(20)}T3BlbkFJ{made(20)}",
    "Private Key": f"{HEAD}\n{BODY}{made(48)}\n{made(64, seed=1)}\n-----END RSA PRIVATE KEY-----",
    "PyPI Token": "pypi-AgEIcHlwaS5vcmc" + made(90),
    "SendGrid API Key": f"SG.{made(22)}.{made(43)}",
    "Slack Token": f"xoxb-{made(12, string.digits)}-{made(12, string.digits)}-{made(24)}",
    "Square OAuth Secret": "sq0csp-" + made(43),
    "Stripe Access Key": "sk_live_" + made(24),
    "Telegram Bot Token": f"{made(9, '123456789')}:{made(35)}",
    "Twilio API Key": "SK" + made(32, HEX),
}


@pytest.mark.parametrize(("kind", "secret"), KINDS.items(), ids=KINDS)
@pytest.mark.parametrize("code", ["key = {!r}\n", "Use `{}` for it.", "export KEY={}"])
def test_a_secret_is_found_where_it_is(kind: str, secret: str, code: str) -> None:
    text = "Connect.\n" + (code.format(secret) if "\n" not in secret else secret)
    found = list(secrets.find(text))
    assert kind in [one.kind for one in found]
    assert pl.select(secrets.may_have(pl.lit(text))).item()
    for one in found:
        assert text[one.place - 1 :].startswith(secret[:3]) or kind in (
            "AWS Access Key",
            "NPM tokens",
            "Azure Storage Account access key",
        )
        assert not any(part in str(one) for part in (secret, secret[4:20]))


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "x" * 36,
        "ghp_" + "0" * 36,
        "sk_live_your_key_goes_here_123",
        f"if line == '{HEAD}':\n    return read_key(lines, until='-----END RSA PRIVATE KEY-----')",
        "password = 'hunter2'; api_key = os.environ['API_KEY']",
        "postgres://user:password@localhost:5432/db",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "def f():\n    return 'dGhpcyBpcyBub3QgYSBzZWNyZXQsIGp1c3QgYmFzZTY0'",
        "SKIP",
        "ACCESS_KEY",
        "SG.module.function",
    ],
)
def test_what_stands_for_a_secret_is_none(text: str) -> None:
    assert list(secrets.find(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "ManagementFactoryProviders.create.shouldReturnNotFoundWhenMissing()",
        "1627383929:da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "MKVLAAKIAGLVEHWRNDTSPQYIF",
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwiaWF0IjoxNTE2MjM5MDIyfQ.x",
        "eyJ" + "A" * 20_000 + ".eyJ" + "B" * 20_000,
    ],
)
def test_ordinary_code_that_looks_like_a_secret_is_none(text: str) -> None:
    assert list(secrets.find(text)) == []


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n    ", "\\n"])
@pytest.mark.parametrize("header", ["", "Proc-Type: 4,ENCRYPTED{}DEK-Info: AES-128-CBC,0A1B{}{}"])
def test_a_private_key_is_found_in_every_layout(newline: str, header: str) -> None:
    lines = [
        HEAD,
        header.format(newline, newline, "") + BODY + made(48),
        made(64, seed=2),
        "-----END RSA PRIVATE KEY-----",
    ]
    assert [one.kind for one in secrets.find("key: |" + newline + newline.join(lines))] == ["Private Key"]


def test_a_long_line_is_searched_in_little_time() -> None:
    text = "https://a.b/c " * 70_000 + "sk-" * 30_000 + "-----BEGIN PRIVATE KEY-----" * 1000
    start = time.perf_counter()
    assert list(secrets.find(text)) == []
    assert time.perf_counter() - start < 5


def test_real_pairs_hold_hardly_any(code_alpaca: Path) -> None:
    rows = read_file(code_alpaca.read_bytes(), code_alpaca.name, "b1", RecordSettings()).frame
    texts = rows.select(pl.concat_str("query", "answer", separator="\n")).to_series().drop_nulls()
    assert [one for text in texts for one in secrets.find(text)] == []
    assert texts.to_frame("text").filter(secrets.may_have(pl.col("text"))).height < 20
