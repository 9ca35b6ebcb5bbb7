"""One real scoring, ended 25 times at random: 20 by SIGKILL, 5 by SIGTERM, and taken up again each time.

The script scores through `ModelRuntime`, as the asset does, and writes down how far it is after every batch and every
stored shard. Work done twice is what it had scored and not stored when it ended: under one shard for a kill, nothing
for a SIGTERM. Tolerance: 1e-5 nats per token against an undisturbed scoring, fp32.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline_tests.end_to_end.test_real_models import SMOLLM2, demo_settings, model_cache, read_pairs
from qaq_pipeline_tests.support.frames import TEXTS

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(3600)]

ENDS = [signal.SIGKILL] * 20 + [signal.SIGTERM] * 5
TOLERANCE = 1e-5
END_TOLERANCE = 1e-4
"""The end is a single token, whose rounding no mean reduces."""
SHARD_SECONDS = 0.5
MOST_BATCH_TOKENS = 256

_SCRIPT = """
import json, signal, sys
from pathlib import Path
from qaq_pipeline.config.load import load_settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.storage import Storage


def main(settings_file, pairs_file, folder, role):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    journal = open(Path(folder) / "journal.jsonl", "a", buffering=1)

    def write(kind):
        return lambda progress: journal.write(json.dumps([kind, progress.done_tokens]) + "\\n")

    settings = load_settings(settings_file)
    pairs = [Pair(*row) for row in json.loads(Path(pairs_file).read_text())]
    storage = Storage(str(Path(folder) / "storage"), Path(folder) / "locks")
    sections = (settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)
    runtime = ModelRuntime(*sections, on_progress=write("batch"))
    started = lambda estimate: journal.write(json.dumps(["start", estimate.num_tokens]) + "\\n")
    scored = runtime.score(role, Pairs.of(pairs), storage, write("shard"), started)
    scored.frame.write_parquet(Path(folder) / "scored.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


class Scoring:
    """The same scoring, started again and again over one folder."""

    def __init__(self, folder: Path, settings_file: Path, pairs_file: Path, role: str) -> None:
        folder.mkdir()
        script = folder / "score.py"
        script.write_text(_SCRIPT, encoding="utf-8")
        self._command = [sys.executable, str(script), str(settings_file), str(pairs_file), str(folder), role]
        self._journal = folder / "journal.jsonl"
        self._table = folder / "scored.parquet"

    def start(self) -> subprocess.Popen[bytes]:
        self._journal.unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(self._command, env=environment, stderr=subprocess.PIPE)

    def entries(self) -> list[tuple[str, int]]:
        """(kind, tokens) of what the running scoring has written down; its last line may be half written."""
        if not self._journal.exists():
            return []
        lines = self._journal.read_text(encoding="utf-8").splitlines(keepends=True)
        return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]

    def finish(self) -> pl.DataFrame:
        with self.start() as process:
            _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        return pl.read_parquet(self._table)

    def end(self, by: signal.Signals, seconds: float) -> bool:
        """Start it, and end it so long after its first batch. False where it was finished before."""
        with self.start() as process:
            while process.poll() is None and not any(kind == "batch" for kind, _ in self.entries()):
                time.sleep(0.02)
            time.sleep(seconds)
            process.send_signal(by)
            process.communicate()
        return process.returncode != 0


def means(table: pl.DataFrame) -> np.ndarray:
    """Mean NLL of each pair and quantity over the tokens of its text, by pair_id."""
    counts = {q: "num_q_tokens" if q in (Quantity.Q, Quantity.Q_GIVEN_A) else "num_a_tokens" for q in TEXTS}
    return table.sort("pair_id").select(pl.col(f"sum_nll_{q}") / pl.col(n) for q, n in counts.items()).to_numpy()


def ends(table: pl.DataFrame) -> np.ndarray:
    """NLL of the end of each pair, by pair_id."""
    return table.sort("pair_id")[f"sum_nll_{Quantity.END}"].to_numpy()


def test_a_scoring_ended_25_times_is_the_undisturbed_one_and_repeats_less_than_a_shard_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (model_cache() / SMOLLM2.gguf).exists():
        pytest.skip(f"{SMOLLM2.gguf} is not in QAQ_MODEL_CACHE or QAQ_HOME/models; `make demo` fetches it")
    settings = demo_settings()
    role = SMOLLM2.role(settings)
    values = settings.model_dump(mode="json")
    values["runtime"] |= {"shard_seconds": SHARD_SECONDS, "batch_tokens": MOST_BATCH_TOKENS, "pool": {"size": 2}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / "pairs.json").write_text(json.dumps([[p.pair_id, p.system, p.query, p.answer] for p in read_pairs()]))

    def new(name: str) -> Scoring:
        return Scoring(tmp_path / name, tmp_path / "settings.yaml", tmp_path / "pairs.json", role)

    undisturbed = new("undisturbed")
    expected = undisturbed.finish()
    (total,) = [tokens for kind, tokens in undisturbed.entries() if kind == "start"]
    stored = [0, *(tokens for kind, tokens in undisturbed.entries() if kind == "shard")]
    largest_shard = max(later - earlier for earlier, later in itertools.pairwise(stored))

    draw = random.Random(0)
    table = pl.DataFrame()
    disturbed = new("disturbed")
    repeated: dict[signal.Signals, list[int]] = {signal.SIGKILL: [], signal.SIGTERM: []}
    expected_left, ended_by = total, None
    for number, by in enumerate([*draw.sample(ENDS, len(ENDS)), None]):
        if by is None:
            table = disturbed.finish()
        else:
            assert disturbed.end(by, draw.uniform(0.0, 1.2)), f"the scoring was finished before end {number}"
        entries = disturbed.entries()
        (left,) = [tokens for kind, tokens in entries if kind == "start"]
        if ended_by is not None:
            repeated[ended_by].append(left - expected_left)
        expected_left, ended_by = left - max(tokens for kind, tokens in entries if kind == "batch"), by

    assert table["pair_id"].sort().equals(expected["pair_id"].sort())
    difference = float(np.abs(means(table) - means(expected)).max())
    difference_of_ends = float(np.abs(ends(table) - ends(expected)).max())
    with capsys.disabled():
        print(
            f"\n{len(ENDS)} ends of one scoring of {total} tokens, largest shard {largest_shard}: scored twice after a "
            f"kill {repeated[signal.SIGKILL]}, after a SIGTERM {repeated[signal.SIGTERM]} tokens; largest difference "
            f"{difference:.2g} nats per token, of the ends {difference_of_ends:.2g} nats"
        )
    assert difference <= TOLERANCE
    assert difference_of_ends <= END_TOLERANCE
    assert len(repeated[signal.SIGKILL]) == 20
    assert max(repeated[signal.SIGKILL]) <= largest_shard + 2 * MOST_BATCH_TOKENS
    assert max(repeated[signal.SIGTERM]) <= 0
