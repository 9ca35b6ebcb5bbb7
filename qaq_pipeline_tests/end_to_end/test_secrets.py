"""200 rows with planted secrets of ten kinds: each is found, and nothing but the delivery and raw_data repeats it."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from qaq_pipeline_tests.conftest import write_jsonl
from qaq_pipeline_tests.screening.test_secrets import LETTERS, made
from qaq_pipeline_tests.support.server import QAQ, write_profile

PER_KIND, CLEAN = 20, 60
MAKERS: dict[str, Callable[[int], str]] = {
    "AWS Access Key": lambda n: "AKIA" + made(16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", n),
    "GitHub Token": lambda n: "ghp_" + made(36, seed=n),
    "GitLab Token": lambda n: "glpat-" + made(20, seed=n),
    "Google API Key": lambda n: "AIza" + made(35, seed=n),
    "Hugging Face Token": lambda n: "hf_" + made(34, seed=n),
    "OpenAI Token": lambda n: f"sk-{made(20, seed=n)}T3BlbkFJ{made(20, seed=n + 1)}",
    "Private Key": lambda n: "-----BEGIN PRIVATE KEY-----\n" + made(64, seed=n) + "\n-----END PRIVATE KEY-----",
    "SendGrid API Key": lambda n: f"SG.{made(22, seed=n)}.{made(43, seed=n + 1)}",
    "Slack Token": lambda n: f"xoxb-{made(12, '123456789', n)}-{made(12, '123456789', n + 1)}-{made(24, seed=n)}",
    "Stripe Access Key": lambda n: "sk_live_" + made(24, seed=n),
}
PLACES = [
    ("response", "client = Client(key={secret!r})\nprint(client.name_{n})\n"),
    ("response", '```sh\nexport KEY_{n}={secret}\ncurl -H "Authorization: Bearer $KEY" https://api.example.com\n```'),
    ("query", "Why does this fail in case {n}?\n\n{secret}\n\nI get an error."),
    ("system", "You are helper {n}. Use {secret} where a key is needed."),
    ("note", "seen in {n}: {secret}"),
]


def row(number: int) -> dict[str, str]:
    words = random.Random(number).sample(["tree", "graph", "queue", "heap", "trie", "cache", "index", "token"], 4)
    query = f"Write function {number} that joins a {words[0]} and a {words[1]}."
    return {"query": query, "response": f"def {words[2]}_{number}(a, b):\n    return a.{words[3]}(b, {number})\n"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_planted_secrets_are_found_and_stand_nowhere_else(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    drawn, rows, secrets = random.Random(0), [row(number) for number in range(CLEAN)], []
    for kind, make in MAKERS.items():
        for n in range(PER_KIND):
            number = len(rows)
            secret = make(1000 * len(secrets))
            field, text = PLACES[(n + len(kind)) % len(PLACES)]
            secrets.append((number, kind, secret))
            rows.append(row(number) | {field: text.format(secret=secret, n=number)})
    order = drawn.sample(range(len(rows)), len(rows))
    file = write_jsonl(tmp_path / "rows.jsonl", [rows[number] for number in order])
    home, models = tmp_path / "home", {role: tiny_model_dir(seed=n) for n, role in enumerate(("strong", "weak"))}
    profile = write_profile(tmp_path / "settings.yaml", models, gates={"max_rejected_share": None})
    environment = os.environ | {"QAQ_HOME": str(home), "QAQ_CONFIG": str(profile)}
    commands = [
        ["run", str(file), "--batch", "b1"],
        ["explain", "b1", f"rows.jsonl:{order.index(CLEAN) + 1}", "--full"],
    ]
    commands.append(["explain", "--text", "Why does this fail"])
    shown = ""
    for command in commands:
        done = subprocess.run([QAQ, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        shown += done.stdout + done.stderr
    screened = pl.read_parquet(home / "storage" / "screened_data" / "b1" / "table.parquet")
    by_row = {one["source_row"] - 1: one for one in screened.iter_rows(named=True)}
    found = Counter(kind for number, kind, _ in secrets if by_row[order.index(number)]["reason"] == "secret")
    print(f"found: {found.total()} of {len(secrets)}; {dict(found)}")
    assert found == dict.fromkeys(MAKERS, PER_KIND)
    assert sum(one["reason"] == "secret" for one in by_row.values()) == len(secrets), "no false alarm"
    parts = {part for _, _, secret in secrets for part in (secret.splitlines()[len(secret.splitlines()) // 2][8:40],)}
    assert all(set(part) - {"-"} <= set(LETTERS + "._-") for part in parts)
    texts = {"what was printed": shown} | dict(_texts(home))
    assert len(texts) > 10
    repeated = {name for name, text in texts.items() if any(part in text for part in parts)}
    assert repeated == set()


def _texts(home: Path) -> list[tuple[str, str]]:
    """Everything in a home as text, but the delivery and raw_data, which are kept as they came."""
    found = []
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        name = path.relative_to(home).as_posix()
        if name.startswith(("storage/deliveries/", "storage/raw_data/", "landing/")):
            continue
        if path.suffix == ".parquet":
            text = json.dumps(pl.read_parquet(path).to_dicts(), default=str, ensure_ascii=False)
        else:
            text = path.read_bytes().decode("utf-8", "replace")
        found.append((name, text))
    return found
