"""Fixtures that several test modules share: tiny models on disk, twenty samples, and settings that name them.

The tiny tokenizer maps every byte to the token of its value, so that a test can write token ids by hand; its special
tokens follow from 256 on (`qaq_pipeline_tests.naive`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dagster as dg
import hypothesis
import pytest
import yaml
from syrupy.assertion import SnapshotAssertion

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.naive import SPECIAL_TOKENS, VOCABULARY_SIZE
from qaq_pipeline_tests.support.sentences import Check

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from qaq_pipeline_tests.support.daemon import Daemon

# Read when the libraries are imported, which test modules do: no test asks a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Set in the processes of pytest-xdist, and read by the console when it is made: a test says how wide it wants it.
os.environ.pop("COLUMNS", None)

# Other processes may take the machine: how long an example takes says nothing of what is tested.
hypothesis.settings.register_profile(
    "without_a_clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("without_a_clock")

# A shell's background job ignores SIGINT, and so would every server that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)

_TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
_GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CHATML = "{% for message in messages %}" + _TURN + "{% endfor %}" + _GENERATION
_NO_SYSTEM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _TURN
    + "{% endfor %}"
    + _GENERATION
)
_IGNORES_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}" + _TURN + "{% endif %}{% endfor %}"
) + _GENERATION

NO_REPORTS = {"pages": False, "plots": False}
"""Drawing takes seconds of every run: only tests of it ask for it."""

NO_CALIBRATION: dict[str, Any] = {
    "calibration": {"enabled": False},
    "selections": [{"name": "diff_high", "strategy": "diff_high"}],
}
"""Four runs a batch fewer. Without calibration no pair is judged, so the selection is one of scores alone."""

TEMPLATES = {
    "chatml": _CHATML,
    "emits_bos": "{{ bos_token }}" + _CHATML,
    "no_system": _NO_SYSTEM,
    "ignores_system": _IGNORES_SYSTEM,
    "trims": _CHATML.replace("message['content']", "message['content'] | trim"),
    "drops_user": "{% for message in messages %}{{ message['role'] }}{% endfor %}",
    "broken": "{{ raise_exception('nothing works') }}",
    "none": None,
}
"""Chat templates by name; `emits_bos` as DeepSeek's and Llama's, `no_system` as Gemma's first one."""

Template = Literal["chatml", "emits_bos", "no_system", "ignores_system", "trims", "drops_user", "broken", "none"]


@dataclass(frozen=True)
class TinyModel:
    """A seeded 2-layer llama (hidden size 32, fp32) with a byte tokenizer; seed 0 is the strong one, 1 the weak."""

    seed: int = 0
    has_bos: bool = True
    template: Template = "chatml"
    max_context: int = 512


def byte_tokenizer(tiny: TinyModel) -> Any:
    """A fast byte-level tokenizer without merges: the id of a byte is its value."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    # Byte-level BPE writes a byte that is no visible character as chr(256 + its place among those).
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    names = {"bos_token": "<s>"} if tiny.has_bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **names)
    tokenizer.chat_template = TEMPLATES[tiny.template]
    return tokenizer


def build_tiny_model(tiny: TinyModel, folder: Path) -> Path:
    """Write the model and its tokenizer into `folder`, in Hugging Face layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tiny.max_context,
        # Wide enough that a wrong context moves an NLL by far more than any tolerance.
        initializer_range=0.3,
        bos_token_id=SPECIAL_TOKENS["<s>"] if tiny.has_bos else None,
        eos_token_id=SPECIAL_TOKENS["</s>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny.seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def check_sentence(snapshot: SnapshotAssertion, tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Asserts that what a person is shown is the sentence in the snapshot; folders, runs and hashes are masked."""
    masks = {
        rf"{re.escape(str(tmp_path_factory.getbasetemp()))}/[^/\s'\"]+": "TMP",
        r"(?<=memory:///)test_\w+": "TMP",
        r"(?<=s3://bucket/)test_\w+": "TMP",
        r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b": "RUN",
        r"\b(?=\w*\d)[0-9a-f]{8,64}\b": "HASH",
    }

    def check(shown: object) -> None:
        assert functools.reduce(lambda text, mask: re.sub(mask, masks[mask], text), masks, str(shown)) == snapshot

    return check


@pytest.fixture(scope="session")
def one_thread() -> None:
    """torch on one thread: on a shared machine two are slower, and a tiny model needs no more."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Callable[..., Path]:
    """Factory: `tiny_model_dir(seed=1, has_bos=False, template="trims", …)` is the folder of that `TinyModel`."""

    @functools.cache
    def build(tiny: TinyModel) -> Path:
        return build_tiny_model(tiny, tmp_path_factory.mktemp("models") / f"{tiny.template}-{tiny.seed}")

    return lambda **variant: build(TinyModel(**variant))


@pytest.fixture
def settings_for(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Factory: `Settings` with two tiny models on the CPU and a QAQ_HOME of the test's own; sections by keyword.

    `settings_for(strong={"frame": "plain"}, tiny={"template": "trims"}, scoring={"prior": "user"})`: what `strong`
    and `weak` give is added to the model's section, `tiny` varies both models on disk. Batches are calibrated where
    `calibration` is given.
    """
    monkeypatch.setenv("QAQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QAQ_CONFIG", raising=False)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)

    def build(
        *,
        strong: dict[str, Any] | None = None,
        weak: dict[str, Any] | None = None,
        tiny: dict[str, Any] | None = None,
        **sections: Any,
    ) -> Settings:
        models = {
            role: {"directory": str(tiny_model_dir(**{"seed": seed, **(tiny or {})})), "device": "cpu"}
            | {"dtype": "float32"}
            | (given or {})
            for seed, (role, given) in enumerate({"strong": strong, "weak": weak}.items())
        }
        values: dict[str, Any] = {
            "models": models,
            "scoring": {"max_tokens": 512} | sections.pop("scoring", {}),
            "ranking": {"num_strata": 2, "min_rows_per_stratum": 2} | sections.pop("ranking", {}),
            **({} if "calibration" in sections else NO_CALIBRATION),
            "reports": NO_REPORTS,
        }
        return parse_settings(yaml.safe_dump(values | sections), "test.yaml")

    return build


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """A Dagster instance in memory, which forgets."""
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty storage on disk."""
    return Storage(str(tmp_path / "storage"), tmp_path / "locks")


SAMPLES = [
    ("Reverse a string in Python.", "def reverse(s):\n    return s[::-1]\n"),
    ("Sum the squares below n.", "def total(n):\n    return sum(i * i for i in range(n))\n"),
    ("Hi", "print('hi')"),
    ("SQL: names of all users", "SELECT name FROM users;"),
    ("Is 7 prime?", "Yes: no number from 2 to 6 divides it."),
    ("C: swap two ints", "void swap(int *a, int *b) { int t = *a; *a = *b; *b = t; }"),
    ("  indent kept \n", "\n\n    if x:\n        pass\n"),
    ("Größe von „naïve“ in UTF-8?", "len('naïve'.encode())  # 6 → ö, ï: 2 bytes each"),
    ("What does <|im_end|> mean?", "It ends a turn: <|im_start|>user\nhello<|im_end|>"),
    ("q", "a"),
    ("Bash: count lines of *.py", "find . -name '*.py' -print0 | xargs -0 cat | wc -l"),
    ("Center a div with CSS.", ".box { display: grid; place-items: center; }"),
    ("Go: read a file", 'data, err := os.ReadFile("a.txt")\nif err != nil {\n\treturn err\n}'),
    ("Regex for a hex colour?", r"^#[0-9a-fA-F]{6}$"),
    ("Explain big-O of binary search.", "Each step halves the range, so it takes O(log n) steps."),
    ("Rust: a vector of 1 to 3", "let v = vec![1, 2, 3];"),
    ("Undo the last git commit, keep the changes", "git reset --soft HEAD~1"),
    ("Fix: for i in range(10) print(i)", "for i in range(10):\n    print(i)"),
    ("日本語の文字列を逆にする", "s[::-1]"),
    ("JS: unique values of an array", "const unique = [...new Set(values)];"),
]


@pytest.fixture(scope="session")
def twenty_samples() -> list[Pair]:
    """Twenty tiny code pairs: one-character and two-character queries, UTF-8, whitespace, special tokens as text."""
    return [Pair(f"{number:032x}", None, query, answer) for number, (query, answer) in enumerate(SAMPLES)]


@pytest.fixture(scope="session")
def code_alpaca() -> Path:
    """2,000 real pairs, where they are at hand: beside the repository, never in it."""
    path = Path(__file__).parents[2] / "shared" / "data" / "code_alpaca_2k.json"
    if not path.exists():
        pytest.skip("shared/data/code_alpaca_2k.json is not here")
    return path


REPEATED_ROW, REJECTED_ROW = 7, 12
"""Rows of `delivered_rows`, from 1."""


def delivered_rows() -> list[dict[str, str]]:
    """Twenty rows: the samples, but row 7 repeats row 1 and row 12 has no query."""
    rows = [{"query": query, "response": answer} for query, answer in SAMPLES]
    rows[REPEATED_ROW - 1] = rows[0]
    rows[REJECTED_ROW - 1] = {"query": "", "response": "nothing was asked"}
    return rows


@pytest.fixture
def delivered(tmp_path: Path) -> Path:
    """A file of `delivered_rows`."""
    return write_jsonl(tmp_path / "delivered" / "rows.jsonl", delivered_rows())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write records as JSONL, and give the path back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings_file(tmp_path: Path) -> Callable[[Settings], Path]:
    """Factory: the settings as a YAML file, for what reads `QAQ_CONFIG` or `--config`."""

    def write(settings: Settings) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
        return path

    return write


_HOLDER = """
import sys, time
from pathlib import Path
from qaq_pipeline.storage.storage import Storage
with Storage("memory://", Path(sys.argv[1])).locks.hold(*sys.argv[2:]):
    print("held", flush=True)
    time.sleep(600)
"""

LockHolder = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def lock_holder() -> Iterator[LockHolder]:
    """Factory: another process, which holds the lock of a partition until it is killed or the test ends."""
    with contextlib.ExitStack() as stack:

        def start(lock_directory: Path, *partition: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", _HOLDER, str(lock_directory), *partition]
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            return process

        yield start


@pytest.fixture
def two_batches(settings_for: Callable[..., Settings], instance: dg.DagsterInstance) -> Daemon:
    """Two published batches; row 3 of the second repeats row 3 of the first."""
    from qaq_pipeline_tests.support.daemon import Daemon, land, some_rows

    settings = settings_for(gates={"max_rejected_share": None})
    daemon = Daemon(settings, instance)
    land(settings, "b1.jsonl", some_rows(0, 1, 3, 4, 5))
    land(settings, "b2.jsonl", some_rows(10, 11, 3, 12, 13))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1"), daemon.curate("b2")
    assert daemon.materialise("curated_dataset", partition=None)
    daemon.tick("rescreening")
    assert daemon.statuses("b2")[2] == "duplicate"
    return daemon


# --- a browser, for the tests of pages ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from qaq_pipeline_tests.support import browsing

    with browsing.running_browser() as chromium:
        yield chromium


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of the UI: it asks nobody else, and meets no error."""
    from qaq_pipeline_tests.support import browsing

    with browsing.open_page(browser) as opened:
        yield opened


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests leave pictures of what they see: the folder that `QAQ_SCREENSHOTS` names, else pytest's own."""
    wanted = os.environ.get("QAQ_SCREENSHOTS")
    folder = Path(wanted) if wanted else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
