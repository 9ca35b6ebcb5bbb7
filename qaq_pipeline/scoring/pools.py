"""Where pairs are scored: in this process, in other processes of this machine, or on a Ray cluster.

Belongs here: the choice by `runtime.pool`, and what only a worker can tell: its dtype and its device. Does not belong
here: what a process does with a chunk (`chunk_scorer`), and the processes (`lm.workers`, `lm.ray_workers`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import ModelSettings, RuntimeSettings
from qaq_pipeline.lm import model_files
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.workers import Processes, ScorerFacts, SequenceScorer, open_processes, open_workers
from qaq_pipeline.scoring.chunk_scorer import ChunkScorer, ScoringSpec

if TYPE_CHECKING:
    from qaq_pipeline.lm.ray_workers import Resources

SCORING_LIBRARIES = ("torch", "transformers", "tokenizers")
"""Libraries whose versions are stored with every score."""

Opened = SequenceScorer | Processes
Kind = tuple[str, dict[str, Any]]
"""A dtype, and with what a model scores: `libraries` and `device`."""
Result = TypeVar("Result")


class Pool(Protocol):
    """Where models are loaded."""

    def local(self, model: ModelSettings) -> ModelSettings:
        """The settings of a model in this process, which may have no such device as a worker."""

    def kind(self, model: ModelSettings) -> Kind:
        """Where the model is loaded: its dtype, the libraries and the kind of device."""

    def on_worker(self, function: Callable[[ModelSettings], Result], model: ModelSettings) -> Result:
        """What a function returns where the model is loaded."""

    def open(self, spec: ScoringSpec, sample_ids: Sequence[int], limit: int) -> AbstractContextManager[Opened]:
        """The model of a scoring, in this process or in at most so many scoring processes."""


def pool_of(runtime: RuntimeSettings) -> Pool:
    """The pool of the settings. Raises `SettingsError` if its package is not installed."""
    if runtime.pool.kind == "ray":
        if find_spec("ray") is None:
            raise SettingsError("runtime.pool: kind: ray needs the package ray; install qaq-pipeline[ray]")
        return RayPool(runtime)
    return LocalPool(may_be_elsewhere=runtime.submit_to is not None)


class LocalPool:
    """This process, or others of this machine.

    Args:
        may_be_elsewhere: runs are submitted, so that this process may have no such device as the machine that scores. A
            model whose dtype and device are named is not asked for here before it is loaded.
    """

    def __init__(self, *, may_be_elsewhere: bool = False) -> None:
        self._may_be_elsewhere = may_be_elsewhere

    def local(self, model: ModelSettings) -> ModelSettings:
        """The same; on the CPU where its device may be elsewhere."""
        return model.model_copy(update={"device": "cpu"}) if self._is_elsewhere(model) else model

    def kind(self, model: ModelSettings) -> Kind:
        """Those of this machine, or those that are named."""
        if self._is_elsewhere(model):
            return model.dtype, {"libraries": _libraries(), "device": model.device.partition(":")[0]}
        return kind_here(model)

    def _is_elsewhere(self, model: ModelSettings) -> bool:
        return self._may_be_elsewhere and "auto" not in (model.dtype, model.device)

    def on_worker(self, function: Callable[[ModelSettings], Result], model: ModelSettings) -> Result:
        """Call it here."""
        return function(model)

    @contextmanager
    def open(self, spec: ScoringSpec, sample_ids: Sequence[int], limit: int) -> Iterator[Opened]:
        """One process for each free GPU or each core, at most so many; one on a CPU is this process."""
        from qaq_pipeline.lm import causal_lm

        with causal_lm.loaders(spec.model, spec.files, spec.scoring.max_tokens, limit, sample_ids) as loads:
            # On a GPU always in a process of its own: its end gives all memory back, and its errors stay there.
            if len(loads) == 1 and spec.scored_with["device"] != "cuda":
                yield loads[0]()
                return
            scorers = [functools.partial(ChunkScorer, spec, load) for load in loads]
            with open_processes(scorers, spec.runtime.patience_seconds) as processes:
                yield processes


class RayPool:
    """The workers of a Ray cluster. Settings, models and storage are found there at the same places as here."""

    def __init__(self, runtime: RuntimeSettings) -> None:
        self._address, self._size = runtime.pool.address or "auto", runtime.pool.size
        self._patience = runtime.patience_seconds

    def local(self, model: ModelSettings) -> ModelSettings:
        """On the CPU: a step needs no GPU of its own."""
        return model.model_copy(update={"device": "cpu"})

    def kind(self, model: ModelSettings) -> Kind:
        """Asked of a worker only where `dtype: auto` leaves it to the device: a worker with a GPU may not be free."""
        if model.dtype == "auto":
            return self.on_worker(kind_here, model)
        device = _placed(model, self._resources(model).gpus).device
        return model.dtype, {"libraries": _libraries(), "device": device}

    def on_worker(self, function: Callable[[ModelSettings], Result], model: ModelSettings) -> Result:
        """Call it on a worker of the cluster."""
        from qaq_pipeline.lm import ray_workers

        resources = self._resources(model)
        there = functools.partial(function, _placed(model, resources.gpus))
        return ray_workers.call(there, resources, self._patience)

    @contextmanager
    def open(self, spec: ScoringSpec, sample_ids: Sequence[int], limit: int) -> Iterator[Processes]:
        """Actors, each with its GPU or its core. Those for which the cluster has no room wait for it."""
        from qaq_pipeline.lm import ray_workers

        resources = self._resources(spec.model, spec.files)
        number = limit if self._size is not None else max(min(limit, ray_workers.num_places(resources)), 1)
        there = replace(spec, model=_placed(spec.model, resources.gpus))
        on_each = math.ceil(number / ray_workers.num_nodes())
        load = functools.partial(_load_on_worker, there, sample_ids, on_each, resources.gpus)
        start = functools.partial(ray_workers.ActorProcess, load, resources)
        with open_workers([start] * number, spec.runtime.patience_seconds) as processes:
            yield processes

    def _resources(self, model: ModelSettings, files: ModelFiles | None = None) -> Resources:
        """What an actor reserves: a core, its GPU, and on a CPU the memory of the weights."""
        from qaq_pipeline.lm import causal_lm, ray_workers

        ray_workers.connect(self._address)
        gpus = model.gpus
        if gpus is None:
            is_on_gpu = model.device.startswith("cuda") or (model.device == "auto" and ray_workers.num_gpus() > 0)
            gpus = 1.0 if is_on_gpu else 0.0
        is_large = files is not None and _placed(model, gpus).device == "cpu"
        return ray_workers.Resources(gpus, causal_lm.num_bytes_to_load(files) if is_large else 0)


def _placed(model: ModelSettings, gpus: float) -> ModelSettings:
    """The settings of a model where Ray has given it its GPU: it sees no other one."""
    is_on_gpu = gpus > 0 and model.device not in ("cpu", "mps")
    return model.model_copy(update={"device": "cuda" if is_on_gpu else "cpu"})


_HELD = ExitStack()
"""What the process of an actor holds as long as it runs."""


def _load_on_worker(spec: ScoringSpec, sample_ids: Sequence[int], number: int, gpus: float) -> ChunkScorer:
    """The model of a scoring in the process of an actor."""
    from qaq_pipeline.lm import causal_lm, devices, ray_workers

    if spec.model.device == "cuda" and gpus >= 1:  # A plain process of the same machine must not take it.
        _HELD.enter_context(devices.lease_gpus(devices.resolve_device("cuda"), 1))
    files = model_files.locate(spec.model, spec.model_cache)
    load = functools.partial(causal_lm.load_model, spec.model, files, spec.scoring.max_tokens, number, sample_ids)
    found = kind_here(spec.model)[1]  # The machines may differ in their libraries.
    scorer = ChunkScorer(replace(spec, files=files, scored_with=found), load)
    device = f"{scorer.facts.device} of {ray_workers.this_node()}"
    scorer.facts = replace(scorer.facts, device=device, scored_with=found)
    return scorer


def kind_here(model: ModelSettings) -> Kind:
    """The dtype that a model has here, and with what it scores: the libraries and the kind of device."""
    from qaq_pipeline.lm import devices

    device = devices.resolve_device(model.device)
    dtype = devices.resolve_dtype(model.dtype, device)
    return dtype, {"libraries": _libraries(), "device": device.type}


def _libraries() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in SCORING_LIBRARIES}


def unloaded_facts_here(model_cache: Path, model: ModelSettings) -> tuple[str, ScorerFacts]:
    """The kind of device here, and the facts of a model without its weights."""
    from qaq_pipeline.lm import causal_lm, devices

    device = devices.resolve_device(model.device)
    files = model_files.locate(model, model_cache)
    dtype = devices.weights_dtype(devices.resolve_dtype(model.dtype, device))
    return device.type, causal_lm.unloaded_facts(files, dtype, device)
