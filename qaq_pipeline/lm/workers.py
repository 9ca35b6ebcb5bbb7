"""Who scores the batches: this process, or several of their own, one for each core or GPU. No torch.

Belongs here: starting and ending scoring processes, handing batches out and results in, leases of GPUs.
Does not belong here: what a batch is, or what becomes of its scores.

A device has one holder at a time, by a lock file that the kernel frees with its holder (`lease_devices`).

    parent    batches ──► pipe ──► worker   a model of its own, one thread on a CPU
              results ◄── pipe ◄──          ends when the parent does: its pipe closes, however the parent died
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from qaq_pipeline.lm.batching import BatchQueue, BatchTooLargeError
from qaq_pipeline.lm.prompts import TokenSequence

Batch = list[TokenSequence]
Scores = Sequence[Sequence[np.ndarray]]
"""For each sequence of a batch and each of its targets, ln p of the target's tokens, in nats."""

_END_SECONDS = 5.0


class WorkerDiedError(RuntimeError):
    """A scoring process ended on its own. The text says how, and what to do."""


@dataclass(frozen=True, slots=True)
class ScorerFacts:
    """What a loaded model says of itself."""

    runner: str
    """Name of the way through the model (see `runner`)."""
    is_padded: bool
    shares_prefixes: bool
    """Whether a shared prefix is computed once."""
    batch_tokens: int
    """Tokens of a batch that its device does best with, and that its memory holds."""
    flops_per_token: float = 0.0
    """Floating-point operations of the body for one token, without attention; 0: not known."""
    flops_per_target: float = 0.0
    """Floating-point operations of the head for one target token; 0: not known."""
    peak_flops_per_second: float = 0.0
    """Of a large matrix product in the model's dtype on its device, measured when it was loaded; 0: not known."""

    def flops(self, num_tokens: int, num_targets: int) -> float:
        """Floating-point operations of body and head for so many tokens, so many of them targets."""
        return num_tokens * self.flops_per_token + num_targets * self.flops_per_target


class SequenceScorer(Protocol):
    """The seam to a model."""

    @property
    def facts(self) -> ScorerFacts:
        """What it says of itself."""
        ...

    def score(self, sequences: Sequence[TokenSequence]) -> Scores:
        """The batch's log-probabilities.

        Raises:
            BatchTooLargeError: the batch does not fit into memory.
        """
        ...


Load = Callable[[], SequenceScorer]


class DeviceBusyError(RuntimeError):
    """Another process scores on the device. The text names it and the remedy."""


@contextmanager
def lease_devices(locks: Mapping[str, str], directory: Path, most: int, timeout: float) -> Iterator[list[str]]:
    """Hold those devices that nobody else holds, at most so many and at least one, until the context ends.

    Args:
        locks: name of the lock by device: what identifies the device itself, whatever it is called here.
        directory: of the lock files; whoever shares it shares the devices.
        most: devices wanted.
        timeout: seconds to wait for the first, where all are held.

    Raises:
        DeviceBusyError: all are held for longer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = {device: directory / f"{name}.lock" for device, name in locks.items()}
    with ExitStack() as leases:
        held = []
        for device, file in files.items():
            with suppress(Timeout):
                if len(held) < most:
                    leases.enter_context(FileLock(file, timeout=0))
                    held.append(device)
        if not held:
            first, file = next(iter(files.items()))
            try:
                leases.enter_context(FileLock(file, timeout=timeout))
            except Timeout as error:
                raise DeviceBusyError(
                    f"{', '.join(files)}: held by other scoring processes (lock {file}); wait for one to end, or set "
                    "another `device`"
                ) from error
            held.append(first)
        yield held


class Workers(Protocol):
    """One or several models that score batches."""

    @property
    def facts(self) -> list[ScorerFacts]:
        """Of each worker."""
        ...

    def run(self, queue: BatchQueue) -> Iterator[tuple[Batch, Scores | None]]:
        """Every batch of the queue with its scores, in the order they come; None where it did not fit.

        A batch that is put back into the queue before the next is asked for is run again.
        """
        ...


@contextmanager
def open_workers(loads: Sequence[Load]) -> Iterator[Workers]:
    """Load the models: one in this process, several in processes of their own.

    Raises:
        WorkerDiedError: a process ended before it could say why.
        Exception: what loading the model raised, from a worker too.
    """
    if len(loads) == 1:
        yield _InProcess(loads[0]())
        return
    processes: list[_Process] = []
    try:
        processes.extend(map(_Process, loads))
        yield _Processes(processes)
    finally:
        for process in processes:
            process.connection.close()  # All at once, so that they end side by side.
        deadline = time.monotonic() + _END_SECONDS
        for process in processes:
            process.end(deadline)


class _InProcess:
    def __init__(self, scorer: SequenceScorer) -> None:
        self._scorer = scorer
        self.facts = [scorer.facts]

    def run(self, queue: BatchQueue) -> Iterator[tuple[Batch, Scores | None]]:
        while batch := queue.take():
            yield batch, _try_to_score(self._scorer, batch)


class _Processes:
    def __init__(self, processes: Sequence[_Process]) -> None:
        self._processes = processes
        self._busy: dict[Connection, tuple[_Process, Batch]] = {}
        self.facts: list[ScorerFacts] = [process.receive() for process in processes]

    def run(self, queue: BatchQueue) -> Iterator[tuple[Batch, Scores | None]]:
        if self._busy:
            raise RuntimeError("an earlier queue was left before its end: its scores would be taken for this one's")
        idle, busy = list(self._processes), self._busy
        while True:
            while idle and (batch := queue.take()):
                process = idle.pop()
                process.send(batch)
                busy[process.connection] = (process, batch)
            if not busy:
                return
            ready = wait(list(busy))
            errors: list[Exception] = []
            for connection in [connection for connection in busy if connection in ready]:
                process, batch = busy.pop(connection)
                try:
                    scores = process.receive()
                except Exception as error:  # noqa: BLE001 - raised below: what others have finished comes first.
                    errors.append(error)
                    continue
                idle.append(process)
                yield batch, scores
            if errors:
                raise errors[0]


class _Process:
    """A process with a model in it, and the pipe to it."""

    def __init__(self, load: Load) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, batch: Batch) -> None:
        try:
            self.connection.send(batch)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self, deadline: float) -> None:
        self._process.join(max(deadline - time.monotonic(), 0))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _died(self) -> WorkerDiedError:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        cause = "killed, as the kernel does when memory runs out" if code == -signal.SIGKILL else f"exit code {code}"
        return WorkerDiedError(
            f"a scoring process ended ({cause}); what it had finished is stored: run again, with a smaller "
            "runtime.processes or runtime.batch_tokens if memory was short"
        )


def _serve(connection: Connection, load: Load) -> None:
    """A worker's life: load, say so, score what comes, end with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends its workers.
    with suppress(_PipeClosedError):
        try:
            scorer = load()
            _send(connection, scorer.facts)
            while True:
                _send(connection, _try_to_score(scorer, _receive(connection)))
        except _PipeClosedError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it.
            _send(connection, _portable(error))


class _PipeClosedError(Exception):
    """The parent has ended, or wants its worker to."""


def _send(connection: Connection, value: object) -> None:
    try:
        connection.send(value)
    except OSError as error:
        raise _PipeClosedError from error


def _receive(connection: Connection) -> Batch:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise _PipeClosedError from error


def _try_to_score(scorer: SequenceScorer, batch: Batch) -> Scores | None:
    try:
        return scorer.score(batch)
    except BatchTooLargeError:
        return None


def _portable(error: Exception) -> Exception:
    """The error, if it survives the way to another process, else its traceback as text."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here.
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # noqa: BLE001, S110 - an exception that cannot be pickled or built again.
        pass
    return RuntimeError("".join(traceback.format_exception(error)))
