"""The demo's two real models, in their demo frames: all five NLLs equal the naive ones, pair by pair.

The naive side is one sequence at a time, full logits, log-softmax in fp32, after contexts and for end tokens written
out here as text. Tolerance: 1e-4 nats per token in fp32; two orders of the same sums differ by up to 4e-5 in these
models.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from qaq_pipeline.config.load import home_directory, parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest.records import read_file
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.naive import TASK, naive_nll, naive_nll_of_any

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("one_thread"),
]

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY.parent / "shared" / "data" / "code_alpaca_2k.json"
EXAMPLES = REPOSITORY / "examples" / "batches"
NUM_PAIRS = 50
NUM_PAIRS_OF_OTHER_PRIORS = 8
TOLERANCE = 1e-4
QUERY_SIDE = (Quantity.Q, Quantity.Q_GIVEN_A)

SYSTEM = "You are a helpful coding assistant."


@dataclass(frozen=True)
class Frame:
    """What stands around Q and A in the two passes, and before Q alone: text, as a person would write it."""

    before_q: str
    between_q_and_a: str
    before_a: str
    between_a_and_q: str
    bare: str

    def context(self, quantity: Quantity, prior: str, query: str, answer: str) -> list[str]:
        """The pieces before the scored text, each tokenised by itself, and in them the system text too."""
        if quantity == Quantity.Q:
            return {
                "null_answer": [self.before_a, self.between_a_and_q],
                "user": [self.before_q],
                "bare": [self.bare],
            }[prior]
        return {
            Quantity.Q_GIVEN_A: [self.before_a, answer, self.between_a_and_q],
            Quantity.A: [self.before_q, self.between_q_and_a],
            Quantity.A_GIVEN_Q: [self.before_q, query, self.between_q_and_a],
            Quantity.END: [self.before_a, answer],
        }[quantity]


@dataclass(frozen=True)
class RealModel:
    """A model of the demo: its file, its frame by name and as text, and the tokens that end an answer."""

    gguf: str
    frame_name: str
    frame: Frame
    ends: tuple[str, ...]

    def role(self, settings: Settings) -> str:
        """The role that the demo gives it."""
        (role,) = [role for role, model in settings.models.items() if model.gguf == self.gguf]
        assert settings.models[role].frame == self.frame_name
        return role


GEMMA = RealModel(
    "gemma-3-270m-q4_k_m.gguf",
    "plain",
    Frame(
        before_q=f"<bos>{SYSTEM}\n\nProblem:\n",
        between_q_and_a="\n\nAnswer:\n",
        before_a=f"<bos>{SYSTEM}\n\n{TASK}",
        between_a_and_q="\n\nProblem:\n",
        bare="<bos>",
    ),
    ("<eos>", "<end_of_turn>"),
)
SMOLLM2 = RealModel(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "chat",
    Frame(
        before_q=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
        between_q_and_a="<|im_end|>\n<|im_start|>assistant\n",
        before_a=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{TASK}",
        between_a_and_q="<|im_end|>\n<|im_start|>assistant\n",
        bare="<|im_start|>",  # SmolLM2 names this token its BOS.
    ),
    ("<|endoftext|>", "<|im_end|>"),
)


def model_cache() -> Path:
    """QAQ_MODEL_CACHE where it is set, else the models of QAQ_HOME."""
    configured = os.environ.get("QAQ_MODEL_CACHE")
    return Path(configured).absolute() if configured else home_directory() / "models"


def demo_settings(**scoring: Any) -> Settings:
    """The demo profile in fp32 on the CPU, with all scores wanted."""
    text = (resources.files("qaq_pipeline") / "profiles" / "demo.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text) | {"model_cache": str(model_cache())}
    for model in values["models"].values():
        model |= {"dtype": "float32", "device": "cpu"}
    values["scoring"] = values.get("scoring", {}) | {"quantities": ["rmi", "ifd", "end"]} | scoring
    return parse_settings(yaml.safe_dump(values), "demo.yaml")


def read_pairs() -> list[Pair]:
    """Pairs spread over the data set where it is at hand, else over the example batches."""
    files = [DATA] if DATA.exists() else sorted(EXAMPLES.iterdir())
    frames = [read_file(path.read_bytes(), path.name, "b", demo_settings().records).frame for path in files]
    rows = pl.concat(frames).filter(pl.col("status") == "accepted").unique("pair_id", maintain_order=True)
    spread = rows.gather_every(max(rows.height // NUM_PAIRS, 1)).head(NUM_PAIRS)
    return [Pair(*row) for row in spread.select("pair_id", "system", "query", "answer").iter_rows()]


class Naive:
    """The converted model and its tokenizer, as transformers gives them."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str, *, is_delivered: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=is_delivered)["input_ids"]

    def mean_nll(self, pair: Pair, quantity: Quantity, prior: str, model: RealModel) -> tuple[float, int]:
        """Mean NLL of the quantity, and how many tokens the forward pass had."""
        pieces = model.frame.context(quantity, prior, pair.query, pair.answer)
        context: list[int] = []
        for piece in pieces:
            if piece in (pair.query, pair.answer):
                context += self.ids(piece, is_delivered=True)
                continue
            before, system, after = piece.partition(SYSTEM)
            context += self.ids(before, is_delivered=False)
            context += self.ids(pair.system or SYSTEM, is_delivered=True) if system else []
            context += self.ids(after, is_delivered=False)
        if quantity is Quantity.END:
            ends = [self.tokenizer.get_vocab()[token] for token in model.ends]
            return naive_nll_of_any(self.model, context, ends), len(context)
        target = self.ids(pair.query if quantity in QUERY_SIDE else pair.answer, is_delivered=True)
        return naive_nll(self.model, context, target) / len(target), len(context) + len(target)


@pytest.fixture(scope="module", params=[GEMMA, SMOLLM2], ids=["gemma-plain", "smollm2-chat"])
def real_model(request: pytest.FixtureRequest) -> tuple[RealModel, Naive]:
    """A model of the demo and its naive twin; skips where its file is not in the model cache."""
    from qaq_pipeline.lm.model_files import locate

    model: RealModel = request.param
    if not (model_cache() / model.gguf).exists():
        pytest.skip(f"{model.gguf} is not in QAQ_MODEL_CACHE or QAQ_HOME/models; `make demo` fetches it")
    settings = demo_settings()
    files = locate(settings.models[model.role(settings)], model_cache())
    return model, Naive(files.folder)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Writes a line to the terminal, whether or not the test passes."""

    def write(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(line + "\n")

    return write


def compare(
    real_model: tuple[RealModel, Naive],
    pairs: list[Pair],
    quantities: list[Quantity],
    storage: Storage,
    say: Callable[[str], None],
    **scoring: Any,
) -> dict[str, float]:
    """The largest difference of each quantity, printed with both paths' times."""
    from qaq_pipeline.scoring.runtime import ModelRuntime

    model, naive = real_model
    settings = demo_settings(**scoring)
    runtime = ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)
    scored = runtime.score(model.role(settings), Pairs.of(pairs), storage, lambda _: None)
    rows = {row["pair_id"]: row for row in scored.frame.iter_rows(named=True)}
    assert not any(row["is_truncated"] for row in rows.values())

    largest = dict.fromkeys(map(str, quantities), 0.0)
    num_tokens, started = 0, time.monotonic()
    for pair in pairs:
        row = rows[pair.pair_id]
        for quantity in quantities:
            expected, tokens = naive.mean_nll(pair, quantity, settings.scoring.prior, model)
            num_tokens += tokens
            counted = "num_q_tokens" if quantity in QUERY_SIDE else "num_a_tokens"
            count = 1 if quantity is Quantity.END else row[counted]
            assert row[f"null_reason_{quantity}"] is None
            largest[quantity] = max(largest[quantity], abs(row[f"sum_nll_{quantity}"] / count - expected))
    seconds = time.monotonic() - started
    report = scored.report
    say("")
    say(
        f"{model.gguf}, prior {settings.scoring.prior}, {len(pairs)} pairs: largest difference, nats per token: "
        + json.dumps({quantity: float(f"{value:.2g}") for quantity, value in largest.items()})
    )
    say(
        f"  fast {report.seconds:.1f} s, {report.num_tokens} tokens ({report.num_tokens / report.seconds:.0f}/s); "
        f"naive {seconds:.1f} s, {num_tokens} tokens ({num_tokens / seconds:.0f}/s)"
    )
    return largest


def test_all_five_nlls_of_real_pairs_equal_the_naive_ones(
    real_model: tuple[RealModel, Naive], tmp_path: Path, say: Callable[[str], None]
) -> None:
    pairs = read_pairs()
    storage = Storage(str(tmp_path / "storage"), tmp_path / "locks")
    largest = compare(real_model, pairs, list(Quantity), storage, say)
    assert demo_settings().scoring.prior == "null_answer"
    assert max(largest.values()) <= TOLERANCE


@pytest.mark.parametrize("prior", ["user", "bare"])
def test_the_other_priors_equal_the_naive_ones(
    prior: str, real_model: tuple[RealModel, Naive], tmp_path: Path, say: Callable[[str], None]
) -> None:
    pairs = read_pairs()[:NUM_PAIRS_OF_OTHER_PRIORS]
    storage = Storage(str(tmp_path / "storage"), tmp_path / "locks")
    largest = compare(real_model, pairs, list(Quantity), storage, say, prior=prior)
    assert max(largest.values()) <= TOLERANCE
