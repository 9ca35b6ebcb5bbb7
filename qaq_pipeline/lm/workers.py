"""Workers that score batches: this process alone, or one process per core or GPU. No torch.

Belongs here: the start, the loss and the end of scoring processes, and the exchange of batches and scores with them.
Does not belong here: the choice of batches (`batching`), the model in a worker (`causal_lm`), leases of GPUs
(`devices`), and the use of the scores.

    parent    batches ──► pipe ──► worker   has its own model, and one thread on a CPU
              results ◄── pipe ◄──          ends with its parent: the pipe closes, however the parent died

A process that ends, or answers nothing, is replaced, and its batch is scored again: in halves and, where there is
another process, by that one. So a sequence that ends every process is soon alone, and is given up after three; and a
process that fails with whatever it gets is not started a fourth time.
"""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np

from qaq_pipeline.lm.batching import BatchQueue, BatchTooLargeError
from qaq_pipeline.lm.prompts import TokenSequence
from qaq_pipeline.schema.vocabularies import NullReason

logger = logging.getLogger(__name__)

Batch = list[TokenSequence]
Scores = Sequence[Sequence[np.ndarray]]
"""For each sequence and each of its targets, ln p of the target's tokens, in nats."""
Outcome = Scores | NullReason
"""The scores of a batch; OUT_OF_MEMORY: it did not fit; WORKER_LOST: its one sequence ended every process."""

MAX_TRIES = 3
"""Processes that a sequence may end before it is given up, and processes in a row that may end in one place."""
PATIENCE_SECONDS = 1800.0
"""Default time that a process has to load its model, or to score a batch, before it counts as lost."""
_END_SECONDS = 5.0
_REMEDY = (
    "finished scores are stored: run again, with a smaller runtime.processes or runtime.batch_tokens if memory was "
    "short"
)


class WorkerDiedError(RuntimeError):
    """A scoring process ended unexpectedly. The text names the cause and the remedy."""


class BrokenDeviceError(RuntimeError):
    """A process can use its device no more. The text is the device's error."""


class _LostError(Exception):
    """A process ended, or did not answer. The text is the cause."""


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
    device: str = "cpu"
    """The device, for people."""

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
            BrokenDeviceError: this process can use its device no more.
        """


Load = Callable[[], SequenceScorer]


class Workers(Protocol):
    """One or several models that score batches."""

    @property
    def facts(self) -> list[ScorerFacts]:
        """The properties of each worker's model."""

    @property
    def num_lost(self) -> int:
        """Processes that were lost since the start."""

    def run(self, queue: BatchQueue) -> Iterator[tuple[Batch, Outcome]]:
        """Every batch of the queue with its outcome, in the order of completion.

        The caller may split a batch that did not fit: the queue then returns its halves. A batch that was lost with its
        process may come in parts.

        Raises:
            WorkerDiedError: processes ended in every place, `MAX_TRIES` in a row.
            Exception: raised while a batch was scored.
        """


@contextmanager
def open_workers(
    loads: Sequence[Load], *, in_process: bool = True, patience: float = PATIENCE_SECONDS
) -> Iterator[Workers]:
    """Load the models, each in a process of its own.

    Args:
        loads: of the models.
        in_process: a single model is loaded in this process.
        patience: seconds that a process has to load its model, or to score a batch.

    Raises:
        WorkerDiedError: a process ended without reporting an error, or did not load in time.
        Exception: raised while a model was loaded, here or in a worker.
    """
    if len(loads) == 1 and in_process:
        yield _InProcess(loads[0]())
        return
    seats: list[_Seat] = []
    try:
        for load in loads:
            seats.append(_Seat(load, patience))  # noqa: PERF401 - those that were started are ended, whatever fails.
        yield _Processes(seats)
    finally:
        for seat in seats:
            seat.process.connection.close()  # All at once, so that they end in parallel.
        deadline = time.monotonic() + _END_SECONDS
        for seat in seats:
            seat.process.end(deadline)


class _InProcess:
    num_lost = 0

    def __init__(self, scorer: SequenceScorer) -> None:
        self._scorer = scorer
        self.facts = [scorer.facts]

    def run(self, queue: BatchQueue) -> Iterator[tuple[Batch, Outcome]]:
        while batch := queue.take():
            yield batch, _try_to_score(self._scorer, batch)


@dataclass(frozen=True)
class _Work:
    """A batch, and the places whose processes were lost over it."""

    batch: Batch
    lost_in: Sequence[_Seat] = ()

    def after_loss(self, seat: _Seat) -> list[_Work]:
        """What to try again; nothing: it is one sequence, which was tried often enough."""
        lost_in, middle = (*self.lost_in, seat), len(self.batch) // 2
        if middle:
            return [_Work(self.batch[:middle], lost_in), _Work(self.batch[middle:], lost_in)]
        return [_Work(self.batch, lost_in)] if len(lost_in) < MAX_TRIES else []


class _Processes:
    def __init__(self, seats: Sequence[_Seat]) -> None:
        self._seats = list(seats)
        """Those whose processes do not keep failing."""
        self._again: deque[_Work] = deque()
        self.num_lost = 0
        for seat in seats:
            seat.wait_until_loaded()
        self.facts = [seat.facts for seat in seats if seat.facts is not None]

    def run(self, queue: BatchQueue) -> Iterator[tuple[Batch, Outcome]]:
        if self._again or any(seat.work for seat in self._seats):
            raise RuntimeError("the previous queue was not run to its end: its scores would be mixed with this one's")
        while True:
            for seat in self._seats:
                if seat.is_idle and (work := self._take(seat, queue)) is not None:
                    seat.begin(work)
            is_busy = bool(self._again) or any(seat.work for seat in self._seats)
            if not is_busy and any(seat.is_idle for seat in self._seats):
                return
            yield from self._answers(queue)

    def _take(self, seat: _Seat, queue: BatchQueue) -> _Work | None:
        """What was lost elsewhere first; what was lost here only if every other process was lost over it, too."""
        for work in self._again:
            if seat not in work.lost_in or set(work.lost_in) >= set(self._seats):
                self._again.remove(work)
                return work
        batch = queue.take()
        return _Work(batch) if batch else None

    def _answers(self, queue: BatchQueue) -> Iterator[tuple[Batch, Outcome]]:
        """Wait for an answer, a loss, or the end of a process's time; yield what is finished."""
        waiting = [seat for seat in self._seats if not seat.is_idle]
        seconds = min(seat.deadline for seat in waiting) - time.monotonic()
        ready = wait([seat.process.connection for seat in waiting], max(seconds, 0))
        errors: list[Exception] = []
        for seat in waiting:
            if seat.process.connection not in ready and seat.deadline > time.monotonic():
                continue
            work = seat.work
            try:
                outcome = seat.receive()
            except Exception as error:  # noqa: BLE001 - raised below, after the scores that other workers have finished.
                if isinstance(error, _LostError | BrokenDeviceError) or not seat.is_loaded:
                    yield from self._lose(seat, error, queue)
                else:
                    seat.work = None
                    errors.append(error)
            else:
                if work is not None and outcome is not None:
                    yield work.batch, outcome
        if errors:
            raise errors[0]

    def _lose(self, seat: _Seat, error: Exception, queue: BatchQueue) -> Iterator[tuple[Batch, Outcome]]:
        """Replace a process, and put its batch back."""
        self.num_lost += 1
        work, seat.work = seat.work, None
        if work is None or not work.lost_in:  # Else it may be the sequence that ends every process.
            seat.num_lost += 1
        if seat.num_lost < MAX_TRIES:
            logger.warning("%s; another one is started on %s, and its batch is scored again", error, seat.device)
            seat.start()
        else:
            self._seats.remove(seat)
            logger.warning("%s; %s is left out: %d processes in a row ended there", error, seat.device, MAX_TRIES)
        if not self._seats:
            raise WorkerDiedError(f"{error}; {_REMEDY}") from error
        if work is not None:
            queue.shrink(work.batch)  # Most processes are killed when memory runs out.
            again = work.after_loss(seat)
            self._again += again
            if not again:
                pair_id = work.batch[0].pair_id
                logger.warning("pair %s: given up, since %d or more processes ended over it", pair_id, MAX_TRIES)
                yield work.batch, NullReason.WORKER_LOST


@dataclass(eq=False)
class _Seat:
    """A core or a device, and the process that scores there now."""

    load: Load
    patience: float
    work: _Work | None = None
    facts: ScorerFacts | None = None
    """None until the first process has loaded its model."""
    num_lost: int = 0
    """Processes in a row that ended over a batch that had ended no other."""
    is_loaded: bool = False
    deadline: float = 0.0
    """When it has to have answered."""
    process: _Process = field(init=False)

    def __post_init__(self) -> None:
        self.process = _Process(self.load)
        self._expect_answer()

    @property
    def device(self) -> str:
        """The device, for messages."""
        return "its device" if self.facts is None else self.facts.device

    @property
    def is_idle(self) -> bool:
        """Whether it can take a batch."""
        return self.is_loaded and self.work is None

    def start(self) -> None:
        """Start another process in place of the one that was lost."""
        self.process.connection.close()
        self.process.end(time.monotonic())
        self.is_loaded = False
        self.process = _Process(self.load)
        self._expect_answer()

    def wait_until_loaded(self) -> None:
        """Wait for the first process to load its model. Raises what it raised, or WorkerDiedError."""
        self.process.connection.poll(max(self.deadline - time.monotonic(), 0))
        try:
            self.receive()
        except _LostError as error:
            raise WorkerDiedError(f"{error}; {_REMEDY}") from error

    def begin(self, work: _Work) -> None:
        """Send a batch."""
        self.work = work
        self._expect_answer()
        with suppress(OSError):  # It has ended, which is noticed when its answer is received.
            self.process.connection.send(work.batch)

    def receive(self) -> Outcome | None:
        """The outcome of the batch; None: the model is loaded now. Raises `_LostError`, or what the process raised."""
        if not self.process.connection.poll():
            raise self.process.overdue(self.patience)
        answer = self.process.receive()
        if not self.is_loaded:
            self.facts, self.is_loaded = answer, True
            return None
        self.work, self.num_lost = None, 0
        return answer

    def _expect_answer(self) -> None:
        self.deadline = time.monotonic() + self.patience


class _Process:
    """A scoring process and the pipe to it."""

    def __init__(self, load: Load) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load), daemon=True)
        self._process.start()
        theirs.close()

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

    def overdue(self, seconds: float) -> _LostError:
        """Kill the process, which has not answered for so long; the error that says so."""
        self._process.kill()
        return _LostError(f"a scoring process did not answer for {seconds:,.0f} s (runtime.patience_seconds)")

    def _died(self) -> _LostError:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        cause = "killed, as the kernel does when memory runs out" if code == -signal.SIGKILL else f"exit code {code}"
        return _LostError(f"a scoring process ended ({cause})")


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


def _try_to_score(scorer: SequenceScorer, batch: Batch) -> Outcome:
    try:
        return scorer.score(batch)
    except BatchTooLargeError:
        return NullReason.OUT_OF_MEMORY


def _portable(error: Exception) -> Exception:
    """The error if it can be pickled and rebuilt, else a RuntimeError with its traceback as text."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled in this line.
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # noqa: BLE001, S110 - an exception that cannot be pickled or rebuilt.
        pass
    return RuntimeError("".join(traceback.format_exception(error)))
