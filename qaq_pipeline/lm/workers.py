"""Workers that score batches: this process alone, or one process per core or GPU. No torch.

Belongs here: the start and end of scoring processes, and the exchange of batches and scores with them.
Does not belong here: the choice of batches (`batching`), the model in a worker (`causal_lm`), leases of GPUs
(`devices`), and the use of the scores.

    parent    batches ──► pipe ──► worker   has its own model, and one thread on a CPU
              results ◄── pipe ◄──          ends with its parent: the pipe closes, however the parent died
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np

from qaq_pipeline.lm.batching import BatchQueue, BatchTooLargeError
from qaq_pipeline.lm.prompts import TokenSequence

Batch = list[TokenSequence]
Scores = Sequence[Sequence[np.ndarray]]
"""For each sequence and each of its targets, ln p of the target's tokens, in nats."""

_END_SECONDS = 5.0


class WorkerDiedError(RuntimeError):
    """A scoring process ended unexpectedly. The text names the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class ScorerFacts:
    """Properties of a loaded model that the planning of batches and the report need."""

    runner: str
    """Name of the runner (see `runners`)."""
    is_padded: bool
    shares_prefixes: bool
    """Whether a shared prefix is computed once."""
    batch_tokens: int
    """Number of tokens of one forward pass that is fast on the device and fits into its memory."""
    flops_per_token: float = 0.0
    """Floating-point operations of the body for one token, without attention; 0 if unknown."""
    flops_per_target: float = 0.0
    """Floating-point operations of the output head (the model's last layer) for one target token; 0 if unknown."""
    peak_flops_per_second: float = 0.0
    """Speed of a large matrix product in the model's dtype on its device, measured after loading; 0 if unknown."""

    def flops(self, num_tokens: int, num_targets: int) -> float:
        """Floating-point operations of body and head for `num_tokens` tokens with `num_targets` target tokens."""
        return num_tokens * self.flops_per_token + num_targets * self.flops_per_target


class SequenceScorer(Protocol):
    """The interface to a loaded model; tests replace it."""

    @property
    def facts(self) -> ScorerFacts:
        """The properties of the model."""

    def score(self, sequences: Sequence[TokenSequence]) -> Scores:
        """Returns the batch's log-probabilities.

        Raises:
            BatchTooLargeError: the batch does not fit into memory.
        """


Load = Callable[[], SequenceScorer]


class Workers(Protocol):
    """One or several models that score batches."""

    @property
    def facts(self) -> list[ScorerFacts]:
        """The properties of each worker's model."""

    def run(self, queue: BatchQueue) -> Iterator[tuple[Batch, Scores | None]]:
        """Every batch of the queue with its scores, in the order of completion; None if a batch did not fit.

        The caller may split a batch that did not fit: the queue then returns its halves.
        """


@contextmanager
def open_workers(loads: Sequence[Load]) -> Iterator[Workers]:
    """Load the models: a single one in this process, several in one process each.

    Raises:
        WorkerDiedError: a process ended without reporting an error.
        Exception: raised while a model was loaded, here or in a worker.
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
            process.connection.close()  # All at once, so that they end in parallel.
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
            raise RuntimeError("the previous queue was not run to its end: its scores would be mixed with this one's")
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
                except Exception as error:  # noqa: BLE001 - raised below, after the scores that other workers have finished.
                    errors.append(error)
                    continue
                idle.append(process)
                yield batch, scores
            if errors:
                raise errors[0]


class _Process:
    """A scoring process and the pipe to it."""

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
            f"a scoring process ended ({cause}); finished scores are stored: run again, with a smaller "
            "runtime.processes or runtime.batch_tokens if memory was short"
        )


def _serve(connection: Connection, load: Load) -> None:
    """Run a worker: load the model, send its properties, score every batch received, end when the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends its workers.
    with suppress(OSError):  # The parent has closed the pipe: nobody receives the error that this caused.
        try:
            scorer = load()
            connection.send(scorer.facts)
            while True:
                connection.send(_try_to_score(scorer, connection.recv()))
        except Exception as error:  # noqa: BLE001 - the parent raises it, whatever it is.
            connection.send(_portable(error))


def _try_to_score(scorer: SequenceScorer, batch: Batch) -> Scores | None:
    try:
        return scorer.score(batch)
    except BatchTooLargeError:
        return None


def _portable(error: Exception) -> Exception:
    """The error if it can be pickled and rebuilt, else a RuntimeError with its traceback as text."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled in this line.
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # noqa: BLE001, S110 - an exception that cannot be pickled or rebuilt.
        pass
    return RuntimeError("".join(traceback.format_exception(error)))
