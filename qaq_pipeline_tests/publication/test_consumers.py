"""Readers of the exports: `datasets`, TRL, LLaMA-Factory, and Axolotl by its documentation.

`datasets` and TRL are the extra `consumers`. LLaMA-Factory pins older libraries, so it has an environment of its own,
whose Python QAQ_LLAMA_FACTORY names; `make test-consumers` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from huggingface_hub import DatasetCardData, metadata_load

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.publication import curated_dataset
from qaq_pipeline.publication.exports import FORMATS
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.publication.test_exports import as_pair
from qaq_pipeline_tests.support.frames import store_batch

datasets = pytest.importorskip("datasets", reason="needs the extra `consumers`")

SETTINGS = """
models: {strong: {hub: tiny/strong}, weak: {hub: tiny/weak}}
ranking: {num_strata: 1, min_rows_per_stratum: 1}
selections:
  - {name: every, strategy: diff_high, budget: {fraction: 1.0}}
  - {name: one, strategy: diff_high, budget: {count: 1}}
export: {formats: [messages, prompt_completion, alpaca, sharegpt, parquet, hf], selections: all, meta: true}
"""
HOSTILE: tuple[dict[str, Any], ...] = (
    {
        "system": "Be brief.",
        "query": "größe 日本 😀 \u2028 \u0085",
        "answer": "a\0b\r\nc",
        "source": "x",
        "language": "go",
    },
    {"system": "", "query": "  indent kept \n", "answer": "\n\n    pass\n", "source": "", "language": "2026-11-02"},
    {"query": "[1, 2]", "answer": '{"a": [1, "b"]}', "record": '{"a": [1, "b"], "c": null}'},
    {"query": "long " * 20_000, "answer": "short", "language": "python"},
    {"query": "null", "answer": "long " * 20_000, "source": "3"},
    # The highest gap, and all that the selection `one` has: no system text, no language, and a source like a date.
    {"query": "Which day is 2026-11-02?", "answer": "A Monday.", "source": "2026-11-02"},
)
BATCH = "2026-11-02"

WHOLE = """
models: {strong: {hub: tiny/strong}, weak: {hub: tiny/weak}}
ranking: {num_strata: 1, min_rows_per_stratum: 1}
selections: [{name: every, strategy: diff_high, budget: {fraction: 1.0}}]
records: {context: history}
export: {rows: conversation}
"""
RECORD = (
    '{"tools":[{"type":"function","function":{"name":"weather","description": "w", "parameters":{"type":"object",'
    '"properties": {"in": {"type": "string", "description": "place"}}}}}], "messages": ['
    '{"role": "user", "content": "Weather?  \\u00fc %d"}, {"role": "assistant", "content": "", "tool_calls": '
    '[{"type": "function", "function": {"name": "weather", "arguments": {"in": "Bern"}}}]},'
    '{"role": "tool","content":"sunny"},'
    '{"role":"assistant", "reasoning_content": "So it is.", "content": "Sunny: sunny."}]}'
)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return parse_settings(SETTINGS)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Storage:
    """A storage with the hostile batch."""
    root = tmp_path_factory.mktemp("consumers")
    storage = Storage(str(root / "storage"), root / "locks")
    store_batch(storage, settings, BATCH, HOSTILE)
    return storage


@pytest.fixture(scope="module")
def version(storage: Storage, settings: Settings) -> Path:
    """The folder of a version, with every selection in every format."""
    batches, excluded = curated_dataset.read_batches(storage, [BATCH], settings)
    assert excluded == {}
    return Path(curated_dataset.publish(storage, settings, batches, excluded).url)


@pytest.fixture(scope="module")
def load(version: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`datasets.load_dataset` of the version's folder, with a cache of the tests' own."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return lambda name=None, **others: datasets.load_dataset(
        str(version), name=name, split="train", cache_dir=cache, **others
    )


def expected(storage: Storage, selection: str) -> list[tuple[str, str, str]]:
    """(system, query, answer) of a selection's rows by the decisions, best first."""
    decisions = storage.tables.read("decisions", Partition(BATCH)).frame
    verdicts = decisions.explode("verdicts").filter(
        pl.col("verdicts").struct.field("selection") == selection, pl.col("verdicts").struct.field("is_selected")
    )
    rows = verdicts.sort(pl.col("verdicts").struct.field("position"))["source_row"]
    return [(HOSTILE[n - 1].get("system") or "", HOSTILE[n - 1]["query"], HOSTILE[n - 1]["answer"]) for n in rows]


SELECTIONS = {"every": 6, "control_random": 6, "control_stratified_random": 6, "one": 1}
JSON_FORMATS = [name for name, one in FORMATS.items() if one.is_json]


# --- datasets ---------------------------------------------------------------------------------------------------------


def test_datasets_sees_every_json_file_as_a_configuration(version: Path, load: Callable[..., Any]) -> None:
    names = datasets.get_dataset_config_names(str(version))
    assert names == [f"{selection}-{kind}" for selection in SELECTIONS for kind in JSON_FORMATS]
    assert load().num_rows == SELECTIONS["every"], "the first is the default"


@pytest.mark.parametrize("kind", list(FORMATS))
def test_datasets_loads_every_file_of_a_format_with_the_same_types_and_the_rows_of_the_decisions(
    version: Path, storage: Storage, load: Callable[..., Any], kind: str
) -> None:
    found = {}
    for selection in SELECTIONS:
        if kind == "hf":
            found[selection] = datasets.load_from_disk(str(version / selection / "hf"))
        elif kind == "parquet":
            found[selection] = load(data_files=f"{selection}/messages.parquet")
        else:
            found[selection] = load(f"{selection}-{kind}")
    types = {selection: loaded.features for selection, loaded in found.items()}
    text = datasets.Value("string")
    turn = {"from": text, "value": text} if kind == "sharegpt" else {"role": text, "content": text}
    names = FORMATS[kind].columns.names
    assert types["every"] == {name: text if kind == "alpaca" else datasets.List(turn) for name in names} | {
        "meta": text
    }
    assert all(one == types["every"] for one in types.values())
    for selection, loaded in found.items():
        rows = loaded.to_list()
        metas = [json.loads(row.pop("meta")) for row in rows]
        assert [as_pair(row) for row in rows] == expected(storage, selection)
        assert [meta["source"] for meta in metas] == [HOSTILE[meta["source_row"] - 1].get("source") for meta in metas]
    assert {selection: loaded.num_rows for selection, loaded in found.items()} == SELECTIONS


def test_datasets_takes_the_scores_for_no_training_data_but_loads_them(load: Callable[..., Any]) -> None:
    scores = load(data_files="scores/*.parquet")
    assert scores.num_rows == len(HOSTILE) + 1
    assert "rmi_strong" in scores.column_names


def test_the_hub_takes_the_metadata_of_the_card(version: Path) -> None:
    metadata = metadata_load(version / "README.md")
    assert metadata is not None
    card = DatasetCardData(**metadata)
    assert card.to_dict() == metadata
    assert metadata["license"] == "unknown"


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # TRL warns of what it itself sets.
@pytest.mark.parametrize("kind", ["prompt_completion", "messages"])
def test_trl_takes_two_steps(
    load: Callable[..., Any], tiny_model_dir: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    trl = pytest.importorskip("trl", reason="needs the extra `consumers`")
    trainer, losses = two_steps(trl, tiny_model_dir(), load(f"every-{kind}"), tmp_path)
    assert all(0 < loss < 20 for loss in losses)
    # The row with a system text, of which the template's turns and the loss are told by the tokens.
    tokenizer = trainer.processing_class
    with_system = next(row for row in trainer.train_dataset if "Be brief." in tokenizer.decode(row["input_ids"]))
    text = tokenizer.decode(with_system["input_ids"])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    target = tokenizer.decode([label for label in with_system["labels"] if label >= 0])
    assert target == ("a\0b\r\nc<|im_end|>\n" if kind == "prompt_completion" else text)


def two_steps(trl: Any, folder: Path, rows: Any, output: Path) -> tuple[Any, list[float]]:
    """The trainer after two steps that changed the model, and their losses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = trl.SFTConfig(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=2,
        max_length=512,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().global_step == 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    return trainer, losses


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a version of whole records, which have tools and reasoning."""
    root = tmp_path_factory.mktemp("conversations")
    storage, settings = Storage(str(root / "storage"), root / "locks"), parse_settings(WHOLE)
    store_batch(storage, settings, BATCH, tuple({"query": f"q{n}", "record": RECORD % n} for n in range(4)))
    batches, _ = curated_dataset.read_batches(storage, [BATCH], settings)
    return Path(curated_dataset.publish(storage, settings, batches, {}).url)


@pytest.mark.filterwarnings("default")  # TRL warns of what it itself sets.
def test_a_record_with_tools_and_reasoning_comes_back_to_the_byte_and_trl_takes_two_steps_on_it(
    conversations: Path, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="needs the extra `consumers`")
    written = (conversations / "every" / "conversations.jsonl").read_text("utf-8").splitlines()
    assert sorted(written) == [RECORD % n for n in range(4)]
    assert datasets.get_dataset_config_names(str(conversations))[0] == "every-conversation"
    rows = datasets.load_dataset(str(conversations), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.to_list() == [json.loads(line) for line in written]
    trainer, losses = two_steps(trl, tiny_model_dir(), rows, tmp_path)
    assert all(0 < loss < 20 for loss in losses)
    texts = [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert all("sunny" in text for text in texts)


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------


def test_llama_factory_reads_every_entry_of_its_dataset_info(
    version: Path, storage: Storage, tiny_model_dir: Callable[..., Path]
) -> None:
    entries = list(json.loads((version / "dataset_info.json").read_text()))
    assert entries == [
        f"{selection}_{kind}" for selection in SELECTIONS for kind in ("messages", "alpaca", "sharegpt", "parquet")
    ]
    wanted = [entry for entry in entries if entry.startswith("every")]
    found = probed(version, tiny_model_dir(), wanted)
    assert list(found) == wanted
    texts = [as_llama_factory_renders(*row) for row in expected(storage, "every")]
    for entry, examples in found.items():
        assert examples == texts, entry


def probed(version: Path, model: Path, entries: list[str]) -> dict[str, list[dict[str, str]]]:
    """What LLaMA-Factory makes of entries: text and target of each example."""
    python = os.environ.get("QAQ_LLAMA_FACTORY")
    if python is None:
        pytest.skip("QAQ_LLAMA_FACTORY names no Python that has LLaMA-Factory; `make test-consumers` makes one")
    probe = Path(__file__).parents[1] / "support" / "llama_factory_probe.py"
    done = subprocess.run(
        [python, str(probe), str(version), str(model), *entries], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("examples: ") for line in done.stdout.splitlines() if line.startswith("examples: ")]
    return {value["entry"]: value["examples"] for value in map(json.loads, lines)}


def as_llama_factory_renders(system: str, query: str, answer: str) -> dict[str, str]:
    """The text of an example, and its part that the loss is on, by LLaMA-Factory's template `default`."""
    before = f"System: {system}</s>\n" if system else ""
    return {"text": f"{before}Human: {query}</s>\nAssistant:{answer}</s>\n", "target": f"{answer}</s>\n"}


def test_llama_factory_reads_whole_records(conversations: Path, tiny_model_dir: Callable[..., Path]) -> None:
    (example, *others) = probed(conversations, tiny_model_dir(), ["every_conversation"])["every_conversation"]
    assert len(others) == 3
    call = 'Action: weather\nAction Input: {"in": "Bern"}'
    assert call in example["text"]
    assert example["text"].index(call) < example["text"].index("sunny")
    assert example["target"].endswith("Sunny: sunny.</s>\n")


# --- Axolotl ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "ds_type", "fields"),
    [
        # https://docs.axolotl.ai/docs/dataset-formats/conversation.html: type chat_template, with its default fields.
        ("messages.jsonl", "json", {"messages": ["role", "content"]}),
        ("messages.parquet", "parquet", {"messages": ["role", "content"]}),
        # The same with field_messages: conversations, message_property_mappings: {role: from, content: value}.
        ("sharegpt.jsonl", "json", {"conversations": ["from", "value"]}),
        # https://docs.axolotl.ai/docs/dataset-formats/inst_tune.html: type alpaca.
        ("alpaca.json", "json", {"instruction": [], "input": [], "output": []}),
        # https://docs.axolotl.ai/docs/dataset_loading.html: of a directory, what `save_to_disk` wrote comes first.
        ("hf", None, {"messages": ["role", "content"]}),
    ],
)
def test_the_layout_is_what_axolotl_documents(
    version: Path, tmp_path: Path, path: str, ds_type: str | None, fields: dict[str, list[str]]
) -> None:
    """Axolotl is not run: its documented loaders are `load_from_disk`, and `load_dataset(ds_type, data_files=path)`."""
    file = str(version / "every" / path)
    if ds_type is None:
        loaded = datasets.load_from_disk(file)
    else:
        loaded = datasets.load_dataset(ds_type, data_files=file, split="train", cache_dir=str(tmp_path))
    for row in loaded:
        for name, of_turn in fields.items():
            assert all(sorted(turn) == sorted(of_turn) for turn in row[name]) if of_turn else isinstance(row[name], str)
