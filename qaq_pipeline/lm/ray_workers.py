"""Scoring processes on a Ray cluster: an actor for each, and a thread that represents it here. No torch.

Belongs here: the connection to the cluster, the resources of an actor, and the exchange with it. Does not belong here:
what a process does with a chunk (`scoring.chunk_scorer`), and what happens when it is lost (`workers`).

    workers.Processes    chunks  ──► pipe ──► thread    chunks  ──► actor    on any machine of the cluster
                         results ◄── pipe ◄──           results ◄──
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from qaq_pipeline.lm.model_error import ModelError, first_line
from qaq_pipeline.lm.workers import Chunk, ChunkScorer, Note, Placed, WorkerDiedError, portable

Result = TypeVar("Result")

_LISTEN_SECONDS = 1.0
"""Time between two questions for what an actor notes."""
_CONNECT_SECONDS = 30.0


class RayConnectionError(ModelError):
    """There is no Ray cluster at the address. The text names it and the remedy."""


@dataclass(frozen=True)
class Resources:
    """What an actor reserves in the cluster."""

    gpus: float = 0.0
    num_bytes: int = 0
    """Of memory."""

    @property
    def options(self) -> dict[str, Any]:
        """As Ray takes them."""
        return {"num_cpus": 1.0, "num_gpus": self.gpus, "memory": self.num_bytes}


def connect(address: str) -> None:
    """Connect this process to a cluster, if it is not connected already.

    Args:
        address: `auto` for the cluster of this machine or of RAY_ADDRESS, `HOST:PORT`, or `ray://HOST:PORT`.

    Raises:
        RayConnectionError: no cluster answers there.
    """
    if ray.is_initialized():
        return
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host:  # Ray itself tries for many minutes.
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        with _own_signals():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, RayError, ValueError, RuntimeError) as error:
        raise RayConnectionError(
            f"runtime.pool.address: no Ray cluster answers at {address!r} ({first_line(error)}); start one "
            "with `ray start --head`, or set runtime.pool to another kind"
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handling of SIGTERM, which Ray would replace."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def this_node() -> str:
    """The address of the machine that runs this process."""
    return ray.util.get_node_ip_address()


def num_gpus() -> float:
    """GPUs of the cluster, whether they are free or not."""
    return float(ray.cluster_resources().get("GPU", 0))


def num_places(resources: Resources) -> int:
    """How many actors the cluster has room for, whether the room is free or not."""
    there, wanted = ray.cluster_resources(), resources.options
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    return int(min(there.get(names[name], 0.0) / number for name, number in wanted.items() if number))


def num_nodes() -> int:
    """Machines of the cluster."""
    return max(sum(bool(node["Alive"]) for node in ray.nodes()), 1)


def call(function: Callable[[], Result], resources: Resources, patience: float) -> Result:
    """The result of a function that a worker of the cluster calls.

    Raises:
        WorkerDiedError: no worker has taken it within `patience` seconds.
        Exception: what the function raises.
    """
    remote: Any = ray.remote(_call).options(**resources.options, max_retries=0)
    result = remote.remote(function)
    if not ray.wait([result], timeout=patience)[0]:
        ray.cancel(result, force=True)
        raise WorkerDiedError(
            f"no worker of the Ray cluster became free within {patience:,.0f} s (runtime.patience_seconds): "
            f"{_missing(resources)}"
        )
    try:
        return ray.get(result)
    except RayTaskError as error:
        raise _cause(error) from error


class ActorProcess:
    """An actor that scores chunks, as a `workers.Process`.

    Args:
        load: returns the model, on the machine of the actor.
        resources: of the actor.
    """

    def __init__(self, load: Callable[[], ChunkScorer], resources: Resources) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.is_placed = False
        self._resources = resources
        self._cause = ""
        options: dict[str, Any] = {
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"notes": 1},
            **resources.options,
        }
        actor: Any = ray.remote(**options)
        self._actor: Any = actor(_Actor).remote()
        self._thread = Thread(target=self._serve, args=(theirs, load), daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """End the actor now."""
        with suppress(Exception):  # It may have ended, or the cluster may be gone.
            ray.kill(self._actor)

    def end(self, deadline: float) -> None:
        """End the actor; its thread ends with it."""
        self.kill()
        self._thread.join(max(deadline - time.monotonic(), 0))

    def cause(self) -> str:
        """Why the actor ended, or why it has not begun."""
        return self._cause or _missing(self._resources)

    def _serve(self, theirs: Connection, load: Callable[[], ChunkScorer]) -> None:
        """Represent the actor at the other end of the pipe."""
        with closing(theirs), suppress(OSError, EOFError):  # The pipe is closed where nobody waits for answers.
            try:
                ray.get(self._actor.ready.remote())
                self.is_placed = True
                theirs.send(Placed())
                theirs.send(ray.get(self._actor.load.remote(load)))
                while True:
                    for answer in self._answers(theirs.recv()):
                        theirs.send(answer)
            except RayTaskError as error:
                theirs.send(portable(_cause(error)))
            except RayError as error:  # The actor, its machine or its result is gone.
                self._cause = first_line(error)
            except (OSError, EOFError):
                raise
            except Exception as error:  # noqa: BLE001 - the driver raises it, whatever it is.
                theirs.send(portable(error))

    def _answers(self, chunk: Chunk) -> Iterator[Any]:
        """What the actor notes, then its result."""
        result = self._actor.score.remote(chunk)
        while not ray.wait([result], timeout=_LISTEN_SECONDS)[0]:
            for value in ray.get(self._actor.notes.remote()):
                yield Note(value)
        yield ray.get(result)


class _Actor:
    """Loads a model and scores chunks. A second thread gives away what it notes meanwhile."""

    def __init__(self) -> None:
        self._scorer: ChunkScorer | None = None
        self._notes: SimpleQueue[Any] = SimpleQueue()

    def ready(self) -> None:
        """Returns as soon as the actor has its place."""

    def load(self, load: Callable[[], ChunkScorer]) -> Any:
        """Load the model; its properties."""
        self._scorer = load()
        return self._scorer.facts

    def score(self, chunk: Chunk) -> Any:
        """The result of a chunk."""
        assert self._scorer is not None
        self._noted()  # What is left of the chunk before.
        return self._scorer.score(chunk, self._notes.put)

    @ray.method(concurrency_group="notes")
    def notes(self) -> list[Any]:
        """What was noted since the last call."""
        return self._noted()

    def _noted(self) -> list[Any]:
        found = []
        with suppress(Empty):
            while True:
                found.append(self._notes.get_nowait())
        return found


def _missing(resources: Resources) -> str:
    """What an actor needs, and what the cluster has."""
    there = ray.cluster_resources()
    has = {name: there.get(name, 0) for name in ("CPU", "GPU", "memory")}
    return f"it needs {resources.options}, the cluster has {has}"


def _call(function: Callable[[], Result]) -> Result:
    return function()


def _cause(error: RayTaskError) -> Exception:
    """The error that a worker raised; one that cannot be pickled as text."""
    is_known = isinstance(error.cause, Exception) and not isinstance(error.cause, RayError)
    return error.cause if is_known else RuntimeError(str(error))
