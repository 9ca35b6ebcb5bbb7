"""model_files: the sources of files, their identity, and errors that name the path and the remedy."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import causal_lm, model_files, training
from qaq_pipeline.lm.gguf_files import ConversionError, tokenizer_beside
from qaq_pipeline.lm.model_files import FilesWatch, ModelFiles, ModelNotFoundError, chat_template, locate
from qaq_pipeline.lm.tokenizer import load_tokenizer
from qaq_pipeline_tests.conftest import TEMPLATES
from qaq_pipeline_tests.lm.test_text_ids import tiny_llama
from qaq_pipeline_tests.support.naive import BOS, EOS, SPECIAL_TOKENS, VOCABULARY_SIZE, text
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.tokenizer_families import MARKERS, family, texts

pytestmark = pytest.mark.usefixtures("one_thread")

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def found(cache: Path, **source: str) -> ModelFiles:
    return locate(ModelSettings.model_validate(source), cache)


def refusal(cache: Path, **source: str) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        found(cache, **source)
    return str(caught.value)


def hashes_taken(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The files that are hashed, call by call."""
    calls: list[list[str]] = []
    take = model_files._hash_files

    def record(files: Any) -> str:
        paths = list(files)
        calls.append([path.name for path in paths])
        return take(paths)

    monkeypatch.setattr(model_files, "_hash_files", record)
    return calls


def rewrite(path: Path, data: bytes) -> None:
    """Write with a later time of change: the clock may not have advanced since the last write."""
    later = path.stat().st_mtime_ns + 1_000_000_000
    path.write_bytes(data)
    os.utime(path, ns=(later, later))


# --- end tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [('{"eos_token_id": 7}', [7]), ('{"eos_token_id": [12, 7]}', [12, 7]), ('{"eos_token_id": null}', []), ("{}", [])],
)
def test_the_tokens_at_which_generation_stops_are_an_id_or_a_list(
    config: str, expected: list[int], tmp_path: Path
) -> None:
    files = ModelFiles("m", tmp_path, "files:0")
    assert files.generated_ends() == [], "without the file"
    (tmp_path / "generation_config.json").write_text(config)
    assert files.generated_ends() == expected


# --- directories -----------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny_model_dir(), tmp_path / "tiny", ignore=shutil.ignore_patterns(".*"))


def test_a_directory_is_found_in_the_cache_folder_or_by_its_own_path(directory: Path, tmp_path: Path) -> None:
    relative = found(tmp_path, directory="tiny")
    assert relative == found(tmp_path / "elsewhere", directory=str(directory))
    assert (relative.name, relative.folder) == ("tiny", directory)
    assert relative.revision.removeprefix("files:").isalnum()


def test_a_missing_directory_is_an_error_that_names_it_and_what_is_expected(
    tmp_path: Path, check_sentence: Check
) -> None:
    check_sentence(refusal(tmp_path, directory="absent"))


CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nclass Own: pass\n"


@pytest.mark.parametrize("part", ["config", "tokenizer", "template", "facts"])
def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(
    part: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    marker = tmp_path / "ran"
    for name, kind, key in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, "model_type"),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class"),
    ):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": kind, key: "Own"}))
    (directory / "own.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    model = ModelSettings.model_validate({"directory": str(directory), "frame": "plain"})
    files = locate(model, tmp_path)
    reads = {
        "config": files.num_embeddings,
        "tokenizer": lambda: load_tokenizer(model, files, tmp_path),
        "template": lambda: chat_template(str(directory), tmp_path),
        "facts": lambda: causal_lm.unloaded_facts(files, torch.float32, torch.device("cpu")),
    }
    with pytest.raises(ValueError, match="code") as error:
        reads[part]()
    check_sentence(str(error.value).replace(str(tmp_path), ""))
    assert not marker.exists()


def test_weights_that_are_no_safetensors_are_refused_unread(
    directory: Path, tmp_path: Path, check_sentence: Check
) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    check_sentence(refusal(tmp_path, directory="tiny").replace(str(tmp_path), ""))


def with_vocabulary_of(size: int, folder: Path) -> None:
    """Let the config of a model name another number of tokens than its weights have."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size}))


LOADS: dict[str, Callable[[ModelFiles], Any]] = {
    "scoring": lambda files: causal_lm.load_model(ModelSettings(directory="tiny", device="cpu"), files),
    "training": lambda files: training.load_for_training(files, 0, torch.device("cpu")),
}


@pytest.mark.parametrize("load", [*LOADS.values(), causal_lm.check_weights], ids=[*LOADS, "check"])
def test_weights_of_another_shape_than_the_config_says_are_an_error_with_both(
    load: Callable[[ModelFiles], Any], directory: Path, tmp_path: Path, check_sentence: Check
) -> None:
    with_vocabulary_of(VOCABULARY_SIZE + 23, directory)
    files = found(tmp_path, directory="tiny")
    with pytest.raises(ModelNotFoundError) as error:
        load(files)
    check_sentence(error.value)


@pytest.mark.parametrize("load", [*LOADS.values(), causal_lm.check_weights], ids=[*LOADS, "check"])
def test_weights_that_cannot_be_read_are_an_error_that_names_them(
    load: Callable[[ModelFiles], Any], directory: Path, tmp_path: Path, check_sentence: Check
) -> None:
    (directory / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    files = found(tmp_path, directory="tiny")
    with pytest.raises(ModelNotFoundError) as error:
        load(files)
    check_sentence(str(error.value).replace(str(tmp_path), ""))


def test_a_model_whose_weights_fit_its_config_passes(directory: Path, tmp_path: Path) -> None:
    causal_lm.check_weights(found(tmp_path, directory="tiny"))


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_missing_memory_is_no_fault_of_the_weights(
    load: Callable[[ModelFiles], Any], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load(found(tmp_path, directory="tiny"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_revision_changes_when_a_file_of_the_directory_changes(name: str, directory: Path, tmp_path: Path) -> None:
    before = found(tmp_path, directory="tiny").revision
    assert found(tmp_path, directory="tiny").revision == before
    data = bytearray((directory / name).read_bytes())
    data[-2] ^= 1
    rewrite(directory / name, bytes(data))
    changed = found(tmp_path, directory="tiny").revision
    data[-2] ^= 1
    rewrite(directory / name, bytes(data))
    assert changed != before == found(tmp_path, directory="tiny").revision


def test_the_revision_covers_all_files_of_weights(directory: Path, tmp_path: Path) -> None:
    before, name = found(tmp_path, directory="tiny").revision, "model-00002-of-00002.safetensors"
    (directory / name).write_bytes(b"weights")
    added = found(tmp_path, directory="tiny").revision
    rewrite(directory / name, b"Weights")
    assert len({before, added, found(tmp_path, directory="tiny").revision}) == 3


def test_the_revision_depends_on_content_and_not_on_place_or_time(directory: Path, tmp_path: Path) -> None:
    before = found(tmp_path, directory="tiny").revision
    moved = directory.rename(tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path, ns=(1, 1))
    assert found(tmp_path, directory="moved").revision == before


def test_the_hash_of_weights_is_remembered_until_a_file_changes(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = hashes_taken(monkeypatch)
    for _ in range(3):
        found(tmp_path, directory="tiny")
    assert len(taken) == 1
    assert "model.safetensors" in taken[0]
    rewrite(directory / "model.safetensors", b"other")
    for _ in range(3):
        found(tmp_path, directory="tiny")
    assert len(taken) == 2
    assert not list(directory.glob("*.partial*"))


def test_where_the_hash_cannot_be_remembered_it_is_taken_again(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = found(tmp_path, directory="tiny").revision
    (memory,) = directory.glob(".*.sha256.json")
    memory.unlink()

    def refuse(*args: Any) -> int:
        raise PermissionError("read-only")

    taken = hashes_taken(monkeypatch)
    monkeypatch.setattr(Path, "write_text", refuse)
    with caplog.at_level(logging.INFO):
        assert found(tmp_path, directory="tiny").revision == found(tmp_path, directory="tiny").revision == before
    assert len(taken) == 2
    assert "the hash cannot be stored (read-only)" in caplog.text


def test_the_tokenizer_hash_changes_with_the_tokenizer_alone(directory: Path, tmp_path: Path) -> None:
    files = found(tmp_path, directory="tiny")
    before = files.tokenizer_hash()
    rewrite(directory / "model.safetensors", b"other")
    assert files.tokenizer_hash() == before
    rewrite(directory / "tokenizer.json", b"{}")
    assert files.tokenizer_hash() != before
    assert len(before) == 16


# --- files that change while they are used --------------------------------------------------------------------------


def test_files_that_stay_are_not_hashed_again(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = FilesWatch(found(tmp_path, directory="tiny"))
    hashed = hashes_taken(monkeypatch)
    assert watch.is_unchanged()
    assert watch.found is None
    assert hashed == []


def test_files_that_are_only_touched_are_unchanged(directory: Path, tmp_path: Path) -> None:
    watch = FilesWatch(found(tmp_path, directory="tiny"))
    os.utime(directory / "model.safetensors", (0, 0))
    assert watch.is_unchanged()


def test_a_changed_file_is_seen_and_remembered_even_where_it_is_changed_back(directory: Path, tmp_path: Path) -> None:
    files = found(tmp_path, directory="tiny")
    watch = FilesWatch(files)
    weights = directory / "model.safetensors"
    before = weights.read_bytes()
    rewrite(weights, before + b"x")
    assert not watch.is_unchanged()
    assert watch.found == found(tmp_path, directory="tiny").revision != files.revision
    rewrite(weights, before)
    assert found(tmp_path, directory="tiny").revision == files.revision
    assert not watch.is_unchanged()


def test_files_that_are_being_replaced_are_changed(directory: Path, tmp_path: Path) -> None:
    watch = FilesWatch(found(tmp_path, directory="tiny"))
    shutil.rmtree(directory)
    assert not watch.is_unchanged()
    assert watch.found == "unreadable"


def test_a_model_that_is_named_by_what_it_holds_is_not_looked_at(tmp_path: Path) -> None:
    assert FilesWatch(ModelFiles("tiny/model", tmp_path / "gone", "f" * 40)).is_unchanged()


# --- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(source: Path, path: Path) -> None:
    """The tiny llama of `source` as an fp32 GGUF file."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    writer = gguf.GGUFWriter(str(path), "llama")
    # Bytes, special tokens and one merge, since a GGUF tokenizer needs at least one.
    token_of = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokens = [token_of.get(token_id, f"<unused{token_id}>") for token_id in range(VOCABULARY_SIZE)]
    tokens[-1] = "zz"
    write_gguf_tokenizer(writer, tokens, ["z z"], "gpt-2")
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    write_gguf_model(writer, AutoModelForCausalLM.from_pretrained(source))


def write_gguf_of_family(name: str, pre: str | None, path: Path) -> None:
    """A tiny llama with the tokenizer of a byte-level family as a GGUF file that names this pre-tokenizer."""
    learned = json.loads(family(name).backend.to_str())["model"]
    backend = family(name).backend
    writer = gguf.GGUFWriter(str(path), "llama")
    tokens = [backend.id_to_token(token_id) or "" for token_id in range(backend.get_vocab_size())]
    write_gguf_tokenizer(writer, tokens, [" ".join(merge) for merge in learned["merges"]], pre)
    write_gguf_model(writer, tiny_llama(len(tokens)))


def write_gguf_model(writer: gguf.GGUFWriter, model: Any) -> None:
    """The header and the tensors, and with them the file."""
    write_gguf_header(writer, model.config)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | {
        f"model.layers.{layer}.{name}": f"blk.{layer}.{gguf_name}"
        for layer in range(model.config.num_hidden_layers)
        for name, gguf_name in GGUF_NAMES.items()
    }
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        weight = interleaved(tensor.numpy(), heads.get(module.rpartition(".")[2]))
        writer.add_tensor(f"{names[module]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf_header(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def write_gguf_tokenizer(writer: gguf.GGUFWriter, tokens: list[str], merges: list[str], pre: str | None) -> None:
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in {*SPECIAL_TOKENS, *MARKERS} else normal for token in tokens])
    writer.add_token_merges(merges)


def interleaved(weight: Any, num_heads: int | None) -> Any:
    """A query or key projection in GGUF's order of rotary dimensions; any other weight unchanged."""
    if num_heads is None:
        return weight
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def test_a_missing_gguf_file_is_an_error_that_names_it_and_the_remedy(tmp_path: Path, check_sentence: Check) -> None:
    message = refusal(tmp_path, gguf="absent.gguf")
    assert message.startswith(f"{tmp_path / 'absent.gguf'}: no such GGUF file.")
    assert "`python examples/fetch_models.py`" in message
    check_sentence(message)


def test_a_gguf_file_is_converted_once_to_the_very_same_model(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tiny_model_dir(), tmp_path / "tiny.gguf")
    files = found(tmp_path, gguf="tiny.gguf")
    sha256 = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    assert files == ModelFiles("tiny.gguf", tmp_path / "converted" / f"tiny-{sha256[:12]}-v3", f"gguf:{sha256}")
    assert found(tmp_path, gguf="tiny.gguf") == files
    assert caplog.text.count("converting tiny.gguf once") == 1
    assert [path.name for path in (tmp_path / "converted").iterdir() if path.is_dir()] == [files.folder.name]

    source, converted = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model_dir(), files.folder))
    ids = torch.arange(3, 40)[None]
    assert converted.dtype == torch.float32
    assert torch.equal(converted(ids).logits, source(ids).logits)
    tokenizer: Any = AutoTokenizer.from_pretrained(files.folder)
    assert tokenizer("hé <s>", add_special_tokens=False)["input_ids"] == [*text("hé "), BOS]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)


def test_a_changed_gguf_file_is_hashed_and_converted_again(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = hashes_taken(monkeypatch)
    write_gguf(tiny_model_dir(), tmp_path / "tiny.gguf")
    first = found(tmp_path, gguf="tiny.gguf")
    assert found(tmp_path, gguf="tiny.gguf") == first
    assert taken == [["tiny.gguf"]]
    write_gguf(tiny_model_dir(seed=1), tmp_path / "other.gguf")
    rewrite(tmp_path / "tiny.gguf", (tmp_path / "other.gguf").read_bytes())
    second = found(tmp_path, gguf="tiny.gguf")
    assert taken == [["tiny.gguf"]] * 2
    assert second.revision != first.revision
    assert second.folder != first.folder
    assert first.folder.exists()


def test_a_conversion_that_fails_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF torn")
    for _ in range(2):
        with pytest.raises(Exception, match=r"."):
            found(tmp_path, gguf="torn.gguf")
        assert [path for path in (tmp_path / "converted").iterdir() if path.is_dir()] == []


def converted_ids(files: ModelFiles) -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(files.folder)
    return tokenizer(texts(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def original_ids(name: str) -> list[list[int]]:
    backend = Tokenizer.from_str(family(name).backend.to_str())
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch(texts(), add_special_tokens=False)]


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        *[("gpt-2", "gpt2"), ("llama-bpe", "llama3"), ("qwen2", "qwen2"), ("deepseek-coder", "deepseek_coder")],
        *[("smollm", "smollm"), ("starcoder", "smollm"), ("refact", "smollm"), ("command-r", "smollm")],
    ],
)
def test_a_gguf_file_gives_every_text_the_ids_of_its_original_tokenizer(pre: str, name: str, tmp_path: Path) -> None:
    write_gguf_of_family(name, pre, tmp_path / "tiny.gguf")
    assert converted_ids(found(tmp_path, gguf="tiny.gguf")) == original_ids(name)
    if pre != "gpt-2":
        assert original_ids(name) != original_ids("gpt2")


DECOMPOSED = "cafe\u0301 = 'Gro\u0308\u00dfe'"


@pytest.mark.parametrize(
    ("pre", "is_composed"),
    [
        *[(pre, True) for pre in ("qwen2", "qwen35", "deepseek-r1-qwen", "command-r", "mpt", "olmo")],
        *[(pre, False) for pre in ("gpt-2", "llama-bpe", "starcoder", "deepseek-coder")],
    ],
)
def test_a_gguf_file_composes_characters_as_its_original_tokenizer_does(
    pre: str, is_composed: bool, tmp_path: Path
) -> None:
    write_gguf_of_family("qwen2", pre, tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(
        ModelSettings(gguf="tiny.gguf", frame="plain"), found(tmp_path, gguf="tiny.gguf"), tmp_path
    )
    one, composed = tokenizer.encode_texts([DECOMPOSED, unicodedata.normalize("NFC", DECOMPOSED)])
    assert (one == composed) is is_composed


@pytest.mark.parametrize("pre", ["deepseek-llm", "default", None])
def test_a_gguf_file_whose_pre_tokenizer_cannot_be_carried_over_is_refused(
    pre: str | None, tmp_path: Path, check_sentence: Check
) -> None:
    write_gguf_of_family("deepseek_coder", pre, tmp_path / "tiny.gguf")
    with pytest.raises(ConversionError) as error:
        found(tmp_path, gguf="tiny.gguf")
    check_sentence(error.value)
    assert [path for path in (tmp_path / "converted").iterdir() if path.is_dir()] == []


def test_the_original_tokenizer_beside_a_gguf_file_is_used_and_belongs_to_its_identity(tmp_path: Path) -> None:
    write_gguf_of_family("llama3", "smollm", tmp_path / "tiny.gguf")
    wrong = found(tmp_path, gguf="tiny.gguf")
    family("llama3").backend.save(str(tokenizer_beside(tmp_path / "tiny.gguf")))
    right = found(tmp_path, gguf="tiny.gguf")
    assert converted_ids(right) == original_ids("llama3") != converted_ids(wrong)
    assert right.revision != wrong.revision
    assert right.folder != wrong.folder


def beside_of_another_model(path: Path) -> None:
    family("deepseek_coder").backend.save(str(path))


def beside_with_fewer_tokens(path: Path) -> None:
    whole = json.loads(family("llama3").backend.to_str())
    kept = {token: index for token, index in whole["model"]["vocab"].items() if index < 300}
    whole["model"]["vocab"] = kept
    whole["model"]["merges"] = [merge for merge in whole["model"]["merges"] if "".join(merge) in kept]
    whole["added_tokens"] = []
    path.write_text(json.dumps(whole))


def beside_of_large_files(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@pytest.mark.parametrize("write", [beside_of_another_model, beside_with_fewer_tokens, beside_of_large_files])
def test_a_tokenizer_beside_a_gguf_file_that_is_not_its_own_is_refused(
    write: Callable[[Path], None], tmp_path: Path, check_sentence: Check
) -> None:
    write_gguf_of_family("llama3", None, tmp_path / "tiny.gguf")
    write(tmp_path / "tiny.tokenizer.json")
    with pytest.raises(ConversionError) as error:
        found(tmp_path, gguf="tiny.gguf")
    check_sentence(error.value)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_model_that_cannot_be_had_is_an_error_that_names_it_and_the_remedy(
    hub_cache: Path, tmp_path: Path
) -> None:
    message = refusal(tmp_path, hub="nobody/nothing", revision="abc")
    assert message.startswith("hub model 'nobody/nothing' (revision abc) cannot be downloaded: ")
    assert message.endswith("Check the id and the network, log in if the model is gated, or set a local `directory`")
    assert "(revision newest)" in refusal(tmp_path, hub="nobody/nothing")


def test_a_hub_model_that_is_not_fetched_yet_says_what_fetches_it(
    hub_cache: Path, tmp_path: Path, check_sentence: Check
) -> None:
    with pytest.raises(model_files.ModelNotFetchedError) as error:
        model_files.locate(ModelSettings(hub="nobody/nothing"), tmp_path, download=False)
    check_sentence(error.value)


def test_a_hub_model_is_identified_by_its_commit(hub_cache: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--tiny--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "snapshots" / commit / "model.safetensors").write_bytes(b"")
    for revision in ({}, {"revision": commit}):
        files = found(tmp_path, hub="tiny/model", **revision)
        assert files == ModelFiles("tiny/model", repository / "snapshots" / commit, commit)


# --- borrowed chat templates -----------------------------------------------------------------------------------------


def test_a_chat_template_is_borrowed_from_a_jinja_file(tmp_path: Path) -> None:
    (tmp_path / "sibling.jinja").write_text("{{ messages }} é", encoding="utf-8")
    assert chat_template("sibling.jinja", tmp_path) == "{{ messages }} é"


def test_a_chat_template_is_borrowed_from_a_directory(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    assert chat_template(str(tiny_model_dir(template="trims")), tmp_path) == TEMPLATES["trims"]
    shutil.copytree(tiny_model_dir(), tmp_path / "sibling")
    assert chat_template("sibling", tmp_path) == TEMPLATES["chatml"]


def test_of_several_named_templates_the_default_one_is_borrowed(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    several: Any = AutoTokenizer.from_pretrained(tiny_model_dir())
    several.chat_template = {"default": "the default", "tool_use": "for tools"}
    several.save_pretrained(tmp_path / "sibling")
    assert chat_template("sibling", tmp_path) == "the default"


@pytest.mark.parametrize("source", ["absent.jinja", "nobody/absent"])
def test_a_template_source_that_is_not_there_is_an_error_that_names_it(
    source: str, tmp_path: Path, check_sentence: Check
) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        chat_template(source, tmp_path)
    check_sentence(error.value)


def test_a_template_source_without_a_template_is_an_error_that_says_so(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, check_sentence: Check
) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        chat_template(str(tiny_model_dir(template="none")), tmp_path)
    check_sentence(error.value)
