"""A model's files: from a hub id, a local directory, or a GGUF file converted once to safetensors.

Belongs here: locating, converting and identifying files, and noticing that they change.
Does not belong here: loading the model (`causal_lm`) or its tokenizer (`tokenizer`).
torch and transformers load on first use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import chat_frame, gguf_files
from qaq_pipeline.lm.model_error import ModelError, first_line

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

log = logging.getLogger(__name__)


class ModelNotFoundError(ModelError):
    """A model's files are missing or cannot be read. The text names the model, the place, and the remedy."""


class ModelNotFetchedError(ModelNotFoundError):
    """A hub model is not on this machine yet. The text says what downloads it."""


def unreadable(folder: Path, part: str, error: Exception) -> ModelNotFoundError:
    """The error of a part of a model's files that transformers cannot read."""
    if "trust_remote_code" in str(error):
        return ModelNotFoundError(
            f"{folder}: its {part} needs Python code that comes with the model; such code is never run here, so name "
            "another model"
        )
    return ModelNotFoundError(
        f"{folder}: its {part} cannot be read ({first_line(error)}); fetch the model again, or correct `hub`, "
        "`directory` or `gguf` in the settings"
    )


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A local folder in Hugging Face layout, and the identity of its content."""

    name: str
    folder: Path
    revision: str
    """Commit of a hub model; `gguf:<sha256>` or `files:<sha256>` of a local one."""
    stamps: Mapping[str, list[int]] = field(default_factory=dict, compare=False)
    """Size and time of each hashed file of a local directory, by file name; empty for other sources."""

    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer's files (16 hex digits)."""
        present = [self.folder / name for name in _TOKENIZER_FILES if (self.folder / name).exists()]
        return _hash_files(present)[:16]

    def num_embeddings(self) -> int | None:
        """Number of tokens that the model can read, from its config; None if the config does not have it.

        Raises:
            ModelNotFoundError: the config cannot be read.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # transformers raises errors of any kind.
            raise unreadable(self.folder, "config.json", error) from error
        return getattr(config.get_text_config(), "vocab_size", None)

    def generated_ends(self) -> list[int]:
        """Ids of the tokens at which the model's generation config stops."""
        config = self.folder / "generation_config.json"
        found = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id") if config.exists() else None
        return found if isinstance(found, list) else [] if found is None else [found]

    def num_weight_bytes(self) -> int:
        """Size of the weights, in bytes."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


def locate(model: ModelSettings, cache: Path, *, download: bool = True) -> ModelFiles:
    """The model's files, downloaded or converted if necessary.

    Args:
        model: the model's settings; its relative paths are relative to `cache`.
        cache: folder of local and converted models.
        download: whether a hub model may be downloaded; otherwise it must be in the hub's cache.

    Raises:
        ModelNotFoundError: a local path does not exist, the repository cannot be downloaded, or the weights are no
            safetensors.
        ModelNotFetchedError: the hub model is not in the hub's cache, and `download` is false.
        gguf_files.ConversionError: a GGUF file cannot be converted to the same model.
    """
    if model.gguf is not None:
        return _from_gguf(cache / model.gguf, cache)
    if model.directory is not None:
        files = _from_directory(cache / model.directory)
    else:
        files = _from_hub(str(model.hub), model.revision, download=download)
    if not any(files.folder.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"{files.folder}: has no *.safetensors; weights in other files, which may hold code, are not read: convert "
            "them with `save_pretrained` of transformers, or name another model"
        )
    return files


class FilesWatch:
    """Watches a model's files for changes while they are used for scoring.

    Only a local directory can change under its name: a hub snapshot is named by its commit, a converted GGUF by its
    hash. A change is remembered even if it is undone: either version may have made the scores in between.
    """

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self.found: str | None = None
        """The new revision, or `unreadable`; None if nothing has changed so far."""

    def is_unchanged(self) -> bool:
        """Compare sizes and times; hash the files again only if one differs."""
        folder, before = self._files.folder, self._files
        try:
            if self.found is None and before.stamps and _stamps(_directory_files(folder)) != before.stamps:
                self._files = _from_directory(folder)
                self.found = None if self._files.revision == before.revision else self._files.revision
        except (ModelNotFoundError, OSError):  # They are being replaced at this moment.
            self.found = "unreadable"
        return self.found is None


def chat_template(source: str, cache: Path, name: str | None = None) -> str:
    """The text of a borrowed chat template, from a .jinja file, a local directory, or a hub id.

    Raises:
        ModelNotFoundError: the source does not exist or has no chat template.
        TemplateUnusableError: the source has no template of that name, or one of several has to be chosen.
    """
    from transformers import AutoTokenizer

    local = cache / source
    try:
        if source.endswith(".jinja"):
            templates = local.read_text(encoding="utf-8")
        else:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(local) if local.exists() else source, trust_remote_code=False
            )
            templates = tokenizer.chat_template
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise unreadable(local if local.exists() else Path(source), "tokenizer", error) from error
        raise ModelNotFoundError(f"chat_template_from: {source!r} cannot be read ({first_line(error)})") from error
    chosen = chat_frame.named_template(templates, name, f"chat_template_from: {source!r}")
    if not chosen:
        raise ModelNotFoundError(f"chat_template_from: {source!r} has no chat template")
    return chosen


def _from_hub(hub_id: str, revision: str | None, *, download: bool) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            hub_id, revision=revision, allow_patterns=list(_HUB_PATTERNS), local_files_only=not download
        )
    except LocalEntryNotFoundError as error:
        if download:
            raise ModelNotFoundError(_not_downloaded(hub_id, revision, error)) from error
        raise ModelNotFetchedError(
            f"hub model {hub_id!r} (revision {revision or 'newest'}) is not on this machine yet; `qaq estimate` or "
            "`qaq run` downloads it"
        ) from error
    except Exception as error:  # huggingface_hub raises OSError, ValueError and httpx errors alike
        raise ModelNotFoundError(_not_downloaded(hub_id, revision, error)) from error
    folder = Path(snapshot)
    return ModelFiles(hub_id, folder, folder.name)


def _not_downloaded(hub_id: str, revision: str | None, error: Exception) -> str:
    said = first_line(error)
    return (
        f"hub model {hub_id!r} (revision {revision or 'newest'}) cannot be downloaded: {said}. Check the id and the "
        "network, log in if the model is gated, or set a local `directory`"
    )


def _from_directory(folder: Path) -> ModelFiles:
    if not (folder / "config.json").exists():
        raise ModelNotFoundError(
            f"{folder}: has no config.json; set `directory` to a model directory in Hugging Face layout"
        )
    files = _directory_files(folder)
    stamps = _stamps(files)
    return ModelFiles(folder.name, folder, "files:" + _remembered_hash(files), stamps)


def _directory_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _HUB_PATTERNS for path in folder.glob(pattern) if path.name[0] != ".")


def _from_gguf(gguf: Path, cache: Path) -> ModelFiles:
    if not gguf.exists():
        raise ModelNotFoundError(
            f"{gguf}: no such GGUF file. `python examples/fetch_models.py` fetches the models of the demo into this "
            "QAQ_HOME; for others, put the file there, or correct `gguf` or `model_cache` in the settings"
        )
    beside = gguf_files.tokenizer_beside(gguf)
    sha256 = _remembered_hash([gguf, beside] if beside.exists() else [gguf])
    folder = cache / "converted" / f"{gguf.stem}-{sha256[:12]}-v{gguf_files.VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            log.warning("converting %s once to safetensors; this takes up to a minute", gguf.name)
            gguf_files.convert(gguf, folder)
    return ModelFiles(gguf.name, folder, f"gguf:{sha256}")


def _remembered_hash(files: list[Path]) -> str:
    """sha256 of the files' names and bytes, stored beside them until a size or time changes."""
    stamps = _stamps(files)
    memory = files[0].parent / f".{files[0].name}.sha256.json"
    if memory.exists():
        remembered = json.loads(memory.read_text())
        if remembered["stamps"] == stamps:
            return remembered["sha256"]
    sha256 = _hash_files(files)
    partial = memory.with_name(f"{memory.name}.{os.getpid()}")  # Other processes may read it at the same time.
    try:
        partial.write_text(json.dumps({"stamps": stamps, "sha256": sha256}))
        partial.replace(memory)
    except OSError as error:
        log.info("%s: the hash cannot be stored (%s); it is computed again next time", memory, error)
    return sha256


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size in bytes and time of last change in nanoseconds of each file."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _hash_files(files: Iterable[Path]) -> str:
    """sha256 of a single file's bytes, or of the names and bytes of several files."""
    paths = list(files)
    digest = hashlib.sha256()
    for path in paths:
        if len(paths) > 1:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
