"""Workers: a model in this process, which scores batches, or processes that each have one and score chunks. No torch.

Belongs here: the start, the loss and the end of scoring processes, and the exchange of work and results with them.
Does not belong here: the choice of batches (`batching`), what a process does with a chunk (`scoring.chunk_scorer`), the
model (`causal_lm`), leases of GPUs (`devices`), and the use of the scores.

    parent    chunks  ──► pipe ──► worker   has its own model, and one thread on a CPU
              results ◄── pipe ◄──          ends with its parent: the pipe closes, however the parent died

A process that ends, or is silent for too long, is replaced, and its chunk is scored again: in halves and, where there
is another process, by that one. So a pair that ends every process is soon alone, and is given up after three; and a
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
from dataclasses import dataclass, field, replace
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
"""The scores of a batch; OUT_OF_MEMORY: it did not fit."""
Chunk = Sequence[Any]
"""Work that can be halved."""

MAX_TRIES = 3
"""Processes that a chunk of one may end before it is given up, and processes in a row that may end in one place."""
PATIENCE_SECONDS = 1800.0
"""Default time that a process may be silent before it counts as lost."""
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

    def score(self, sequences: Sequence[TokenSequence], /) -> Scores:
        """Returns the batch's log-probabilities.

        Raises:
            BatchTooLargeError: the batch does not fit into memory.
            BrokenDeviceError: this process can use its device no more.
        """


Load = Callable[[], SequenceScorer]


class ChunkScorer(Protocol):
    """What a process does with a chunk."""

    @property
    def facts(self) -> ScorerFacts:
        """The properties of its model."""

    def score(self, chunk: Chunk, note: Callable[[Any], None], /) -> Any:
        """The result of a chunk. Each call of `note` reaches the parent, and shows that the process is alive.

        Raises:
            BrokenDeviceError: this process can use its device no more.
        """


class ChunkQueue(Protocol):
    """Chunks to score."""

    def take(self) -> Chunk:
        """The next chunk; empty if none is left."""

    def after_loss(self, chunk: Chunk) -> Chunk:
        """What is left to do of a chunk whose process was lost."""


def score_batches(scorer: SequenceScorer, queue: BatchQueue) -> Iterator[tuple[Batch, Outcome]]:
    """Every batch of the queue with its outcome, scored in this process.

    The caller may split a batch that did not fit: the queue then returns its halves.
    """
    while batch := queue.take():
        yield batch, _try_to_score(scorer, batch)


@contextmanager
def open_processes(
    loads: Sequence[Callable[[], ChunkScorer]], patience: float = PATIENCE_SECONDS
) -> Iterator[Processes]:
    """Start a process for each, which loads its model.

    Args:
        loads: of the models.
        patience: seconds that a process may be silent while it loads its model, or scores a chunk.

    Raises:
        WorkerDiedError: a process ended without reporting an error, or did not load in time.
        Exception: raised while a model was loaded.
    """
    seats: list[_Seat] = []
    try:
        for load in loads:
            seats.append(_Seat(load, patience))  # noqa: PERF401 - those that were started are ended, whatever fails.
        yield Processes(seats)
    finally:
        for seat in seats:
            seat.process.connection.close()  # All at once, so that they end in parallel.
        deadline = time.monotonic() + _END_SECONDS
        for seat in seats:
            seat.process.end(deadline)


@dataclass(frozen=True)
class _Work:
    """A chunk, and the places whose processes were lost over it."""

    chunk: Chunk
    lost_in: Sequence[_Seat] = ()

    def after_loss(self, seat: _Seat) -> list[_Work]:
        """What to try again; nothing: it is a chunk of one, which was tried often enough."""
        lost_in, middle = (*self.lost_in, seat), len(self.chunk) // 2
        if middle:
            return [_Work(self.chunk[:middle], lost_in), _Work(self.chunk[middle:], lost_in)]
        return [_Work(self.chunk, lost_in)] if len(lost_in) < MAX_TRIES else []


class Processes:
    """Processes that score chunks. `open_processes` makes them."""

    def __init__(self, seats: Sequence[_Seat]) -> None:
        self._seats = list(seats)
        """Those whose processes do not keep failing."""
        self._numbers = {seat: number for number, seat in enumerate(seats)}
        self._again: deque[_Work] = deque()
        self.num_lost = 0
        """Processes that were lost since the start."""
        for seat in seats:
            seat.wait_until_loaded()
        self.facts = [seat.facts for seat in seats if seat.facts is not None]
        """The properties of the model in each place."""

    def run(
        self, queue: ChunkQueue, on_note: Callable[[int, Any], None] = lambda _number, _note: None
    ) -> Iterator[tuple[Chunk, Any]]:
        """Every chunk with its result, in the order of completion; a chunk that was lost may come in parts.

        The result WORKER_LOST means that the chunk of one ended every process that got it.

        Args:
            queue: of the chunks.
            on_note: called with the number of the place and what its process notes; None: its chunk is finished, or
                was lost.

        Raises:
            WorkerDiedError: processes ended in every place, `MAX_TRIES` in a row.
            Exception: raised while a chunk was scored.
        """
        if self._again or any(seat.work for seat in self._seats):
            raise RuntimeError("the previous queue was not run to its end: its scores would be mixed with this one's")
        while True:
            for seat in self._seats:
                if seat.is_idle and (work := self._take(seat, queue)) is not None:
                    seat.begin(work)
            is_busy = bool(self._again) or any(seat.work for seat in self._seats)
            if not is_busy and any(seat.is_idle for seat in self._seats):
                return
            yield from self._answers(queue, on_note)

    def _take(self, seat: _Seat, queue: ChunkQueue) -> _Work | None:
        """What was lost elsewhere first; what was lost here only if every other process was lost over it, too."""
        for work in self._again:
            if seat not in work.lost_in or set(work.lost_in) >= set(self._seats):
                self._again.remove(work)
                return work
        chunk = queue.take()
        return _Work(chunk) if chunk else None

    def _answers(self, queue: ChunkQueue, on_note: Callable[[int, Any], None]) -> Iterator[tuple[Chunk, Any]]:
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
                result = seat.receive()
            except Exception as error:  # noqa: BLE001 - raised below, after the scores that other workers have finished.
                if isinstance(error, _LostError | BrokenDeviceError) or not seat.is_loaded:
                    yield from self._lose(seat, error, queue, on_note)
                else:
                    seat.work = None
                    errors.append(error)
            else:
                if isinstance(result, _Note):
                    on_note(self._numbers[seat], result.value)
                elif work is not None and seat.work is None:
                    on_note(self._numbers[seat], None)
                    yield work.chunk, result
        if errors:
            raise errors[0]

    def _lose(
        self, seat: _Seat, error: Exception, queue: ChunkQueue, on_note: Callable[[int, Any], None]
    ) -> Iterator[tuple[Chunk, Any]]:
        """Replace a process, and put its chunk back."""
        self.num_lost += 1
        on_note(self._numbers[seat], None)
        work, seat.work = seat.work, None
        if work is None or not work.lost_in:  # Else it may be the pair that ends every process.
            seat.num_lost += 1
        if seat.num_lost < MAX_TRIES:
            logger.warning("%s; another one is started on %s, and its chunk is scored again", error, seat.device)
            seat.start()
        else:
            self._seats.remove(seat)
            logger.warning("%s; %s is left out: %d processes in a row ended there", error, seat.device, MAX_TRIES)
        if not self._seats:
            raise WorkerDiedError(f"{error}; {_REMEDY}") from error
        if work is not None:
            again = replace(work, chunk=queue.after_loss(work.chunk)).after_loss(seat)
            self._again += again
            if not again:
                logger.warning("one pair is given up: %d or more processes ended over it", MAX_TRIES)
                yield work.chunk, NullReason.WORKER_LOST


@dataclass(eq=False)
class _Seat:
    """A core or a device, and the process that scores there now."""

    load: Callable[[], ChunkScorer]
    patience: float
    work: _Work | None = None
    facts: ScorerFacts | None = None
    """None until the first process has loaded its model."""
    num_lost: int = 0
    """Processes in a row that ended over a chunk that had ended no other."""
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
        """Whether it can take a chunk."""
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
        """Send a chunk."""
        self.work = work
        self._expect_answer()
        with suppress(OSError):  # It has ended, which is noticed when its answer is received.
            self.process.connection.send(work.chunk)

    def receive(self) -> Any:
        """The result of the chunk, or a note; None: the model is loaded now.

        Raises:
            _LostError: the process was lost.
            Exception: the process raised it.
        """
        if not self.process.connection.poll():
            raise self.process.overdue(self.patience)
        answer = self.process.receive()
        if not self.is_loaded:
            self.facts, self.is_loaded = answer, True
            return None
        if isinstance(answer, _Note):
            self._expect_answer()
        else:
            self.work, self.num_lost = None, 0
        return answer

    def _expect_answer(self) -> None:
        self.deadline = time.monotonic() + self.patience


class _Process:
    """A scoring process and the pipe to it."""

    def __init__(self, load: Callable[[], ChunkScorer]) -> None:
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
        return _LostError(f"a scoring process was silent for {seconds:,.0f} s (runtime.patience_seconds)")

    def _died(self) -> _LostError:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        cause = "killed, as the kernel does when memory runs out" if code == -signal.SIGKILL else f"exit code {code}"
        return _LostError(f"a scoring process ended ({cause})")


@dataclass(frozen=True)
class _Note:
    """What a process says while it scores a chunk."""

    value: Any


def _serve(connection: Connection, load: Callable[[], ChunkScorer]) -> None:
    """Run a worker: load the model, send its properties, score every chunk received, end when the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends its workers.
    with suppress(OSError):  # The parent has closed the pipe: nobody receives the error that this caused.
        try:
            scorer = load()
            connection.send(scorer.facts)
            while True:
                connection.send(scorer.score(connection.recv(), lambda value: connection.send(_Note(value))))
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
