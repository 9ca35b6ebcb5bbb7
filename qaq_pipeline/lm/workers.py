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

import functools
import logging
import math
import multiprocessing
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from qaq_pipeline.lm.batching import BatchQueue, BatchTooLargeError
from qaq_pipeline.lm.prompts import TokenSequence
from qaq_pipeline.schema.vocabularies import NullReason

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
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
_LOOK_SECONDS = 5.0
_PLACED_SECONDS = 5.0
"""Time in which a place gets its core or its device if it is free."""
_REMEDY = (
    "finished scores are stored: run again, with a smaller runtime.pool.size or runtime.batch_tokens if memory was "
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
    flops_per_attended: float = 0.0
    """Floating-point operations of attention for one pair of a token and one that it attends to; 0 if unknown."""
    peak_flops_per_second: float = 0.0
    """Speed of a large matrix product in the model's dtype on its device, measured after loading; 0 if unknown."""
    device: str = "cpu"
    """The device, for people."""
    scored_with: Mapping[str, Any] = field(default_factory=dict)
    """The libraries and the kind of device, if they may differ from those of the run."""

    def flops(self, num_tokens: int, num_targets: int, num_attended: int) -> float:
        """Floating-point operations of body, head and attention, for so many tokens, target tokens, and pairs of
        tokens of which one attends to the other; 0 if unknown.
        """
        if not self.flops_per_token:
            return 0.0
        head, attention = num_targets * self.flops_per_target, num_attended * self.flops_per_attended
        return num_tokens * self.flops_per_token + head + attention


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


@runtime_checkable
class AheadScorer(SequenceScorer, Protocol):
    """A model whose device computes a batch while this process does something else."""

    def begin(self, sequences: Sequence[TokenSequence], /) -> Callable[[], Scores]:
        """Start a batch. The result waits for its log-probabilities and returns them.

        Raises:
            Exception: here and by the result, as `score`.
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

    The caller may split a batch that did not fit: the queue then returns its halves. Where the model's device computes
    a batch by itself, the next one is started before its outcome is waited for.
    """
    if isinstance(scorer, AheadScorer):
        yield from _one_behind(scorer, queue)
        return
    while batch := queue.take():
        yield batch, _outcome(functools.partial(scorer.score, batch))


def _one_behind(scorer: AheadScorer, queue: BatchQueue) -> Iterator[tuple[Batch, Outcome]]:
    """Every batch with its outcome, which is waited for when the next batch was started."""
    at_work: tuple[Batch, Callable[[], Scores]] | None = None
    while (batch := queue.take()) or at_work:
        begun, error = None, None
        try:
            begun = _outcome(functools.partial(scorer.begin, batch)) if batch else None
        except Exception as caught:  # noqa: BLE001 - raised below.
            error = caught
        if at_work:
            yield at_work[0], _outcome(at_work[1])
        if error is not None:
            raise error  # After the scores of the batch before.
        if isinstance(begun, NullReason):
            yield batch, begun
        at_work = (batch, begun) if callable(begun) else None


class Process(Protocol):
    """A scoring process, on this machine or on another."""

    @property
    def connection(self) -> Connection:
        """Chunks go in. The properties of the model come out, then notes and results; it is closed at the end."""

    @property
    def is_placed(self) -> bool:
        """Whether it has its core or its device. One that waits for it says `Placed` as soon as it has it."""

    def kill(self) -> None:
        """End it now."""

    def end(self, deadline: float) -> None:
        """Wait until it has ended, since its connection is closed; kill it at that time of the monotonic clock."""

    def cause(self) -> str:
        """Why it ended, in a few words."""


class Placed:
    """What a process says that had to wait for its core or its device."""


@dataclass(frozen=True)
class Note:
    """What a process says while it scores a chunk."""

    value: Any


def open_processes(
    loads: Sequence[Callable[[], ChunkScorer]], patience: float = PATIENCE_SECONDS
) -> AbstractContextManager[Processes]:
    """Start a process of this machine for each, which loads its model; as `open_workers`."""
    return open_workers([functools.partial(_LocalProcess, load) for load in loads], patience)


@contextmanager
def open_workers(starts: Sequence[Callable[[], Process]], patience: float) -> Iterator[Processes]:
    """Start processes, and end them at the end.

    Args:
        starts: each starts a process; it is called again for each that is lost.
        patience: seconds that a process may be silent while it loads its model, or scores a chunk.

    Raises:
        WorkerDiedError: none could be started in any place.
        Exception: raised while a model was loaded.
    """
    seats: list[_Seat] = []
    try:
        for start in starts:
            seats.append(_Seat(start, patience))  # noqa: PERF401 - those that were started are ended, whatever fails.
        yield Processes(seats, patience)
    finally:
        for seat in seats:
            seat.close()  # All at once, so that they end in parallel.
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
    """Processes that score chunks. `open_workers` makes them."""

    def __init__(self, seats: Sequence[_Seat], patience: float) -> None:
        self._seats = list(seats)
        """Those whose processes do not keep failing."""
        self._numbers = {seat: number for number, seat in enumerate(seats)}
        self._again: deque[_Work] = deque()
        self._patience = patience
        self._last_placed = time.monotonic()
        """When a process last had a core or a device."""
        self.num_lost = 0
        """Processes that were lost since the start."""
        self._load()

    @property
    def facts(self) -> list[ScorerFacts]:
        """The properties of the model in each place where one was loaded."""
        return [seat.facts for seat in self._numbers if seat.facts is not None]

    @property
    def number(self) -> int:
        """Number of places, also of those that wait for a core or a device."""
        return len(self._seats)

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
            WorkerDiedError: processes ended in every place, `MAX_TRIES` in a row, or got no core and no device.
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
            yield from self._finished(queue, on_note)

    def _load(self) -> None:
        """Wait until a model is loaded in each place that gets its core or its device soon, and in at least one."""
        soon = time.monotonic() + _PLACED_SECONDS
        while (
            any(seat.is_loading for seat in self._seats)
            or not any(seat.is_loaded for seat in self._seats)
            or (time.monotonic() < soon and not all(seat.is_loaded for seat in self._seats))
        ):
            for seat, _, answer in self._answers():
                if isinstance(answer, Exception):
                    self._replace(seat, answer)

    def _take(self, seat: _Seat, queue: ChunkQueue) -> _Work | None:
        """What was lost elsewhere first; what was lost here only if every other process was lost over it, too."""
        for work in self._again:
            others = {seat for seat in self._seats if seat.process.is_placed}
            if seat not in work.lost_in or others <= set(work.lost_in):
                self._again.remove(work)
                return work
        chunk = queue.take()
        return _Work(chunk) if chunk else None

    def _answers(self) -> Iterator[tuple[_Seat, _Work | None, Any]]:
        """Wait for an answer, a loss, or the end of a process's time.

        Returns:
            Of each place that has one: what it worked on, and the answer, or the error.

        Raises:
            WorkerDiedError: no place has had a core or a device for too long.
        """
        if any(seat.process.is_placed for seat in self._seats):
            self._last_placed = time.monotonic()
        elif time.monotonic() > self._last_placed + self._patience:
            raise WorkerDiedError(
                f"no scoring process got a core or a device within {self._patience:,.0f} s (runtime.patience_seconds): "
                f"{self._seats[0].process.cause()}"
            )
        waiting = [seat for seat in self._seats if not seat.is_idle]
        seconds = min(seat.deadline for seat in waiting) - time.monotonic()
        ready = wait([seat.process.connection for seat in waiting], min(max(seconds, 0), _LOOK_SECONDS))
        for seat in waiting:
            if seat.process.connection in ready or seat.deadline <= time.monotonic():
                work = seat.work
                try:
                    answer = seat.receive()
                except Exception as error:  # noqa: BLE001 - the caller raises it, or replaces the process.
                    answer = error
                yield seat, work, answer

    def _finished(self, queue: ChunkQueue, on_note: Callable[[int, Any], None]) -> Iterator[tuple[Chunk, Any]]:
        """The chunks that are finished, or given up, at the next answer."""
        errors: list[Exception] = []
        for seat, work, answer in self._answers():
            if isinstance(answer, Note):
                on_note(self._numbers[seat], answer.value)
            elif not isinstance(answer, Exception):
                if work is not None:
                    on_note(self._numbers[seat], None)
                    yield work.chunk, answer
            elif seat.is_loaded and not isinstance(answer, _LostError | BrokenDeviceError):
                seat.work = None
                errors.append(answer)
            else:
                on_note(self._numbers[seat], None)
                seat.work = None
                self._replace(seat, answer, work)
                if work is not None:
                    again = replace(work, chunk=queue.after_loss(work.chunk)).after_loss(seat)
                    self._again += again
                    if not again:
                        yield work.chunk, NullReason.WORKER_LOST
        if errors:
            raise errors[0]  # After the scores that other workers have finished.

    def _replace(self, seat: _Seat, error: Exception, work: _Work | None = None) -> None:
        """Start another process in place of one that was lost; after `MAX_TRIES` in a row leave the place out.

        Raises:
            Exception: the error, if the first process of the place could not load its model.
        """
        if seat.facts is None and not isinstance(error, _LostError | BrokenDeviceError):
            raise error
        self.num_lost += 1
        if work is None or not work.lost_in:  # Else it may be the pair that ends every process.
            seat.num_lost += 1
        if seat.num_lost < MAX_TRIES:
            logger.warning("%s; another one is started on %s, and its chunk is scored again", error, seat.device)
            seat.renew()
        else:
            self._seats.remove(seat)
            logger.warning("%s; %s is left out: %d processes in a row ended there", error, seat.device, MAX_TRIES)
        if not self._seats:
            raise WorkerDiedError(f"{error}; {_REMEDY}") from error


@dataclass(eq=False)
class _Seat:
    """A core or a device, and the process that scores there now."""

    start: Callable[[], Process]
    patience: float
    work: _Work | None = None
    facts: ScorerFacts | None = None
    """None until the first process has loaded its model."""
    num_lost: int = 0
    """Processes in a row that ended over a chunk that had ended no other."""
    is_loaded: bool = False
    deadline: float = math.inf
    """When it has to have answered."""
    process: Process = field(init=False)
    _sending: Thread | None = None

    def __post_init__(self) -> None:
        self._begin_loading()

    @property
    def device(self) -> str:
        """The device, for messages."""
        return "its device" if self.facts is None else self.facts.device

    @property
    def is_idle(self) -> bool:
        """Whether it can take a chunk."""
        return self.is_loaded and self.work is None

    @property
    def is_loading(self) -> bool:
        """Whether it has its core or its device, and no model yet."""
        return self.process.is_placed and not self.is_loaded

    def renew(self) -> None:
        """Start another process in place of the one that was lost."""
        self.process.kill()
        self.close()
        self.process.end(time.monotonic())
        self._begin_loading()

    def close(self) -> None:
        """Close the connection, so that the process ends."""
        if self._sending is not None and self._sending.is_alive():
            self.process.kill()  # It has not taken its chunk: only its end ends the sending.
            self._sending.join()
        self.process.connection.close()

    def begin(self, work: _Work) -> None:
        """Send a chunk, from another thread: a process that hangs may not take it."""
        self.work = work
        self._expect_answer()
        data = pickle.dumps(work.chunk)  # Here: each thread keeps the memory that it has once taken.
        self._sending = Thread(target=self._send, args=(self.process.connection, data), daemon=True)
        self._sending.start()

    def receive(self) -> Any:
        """The result of the chunk, or a note; None: the model is loaded now, or the process has its device.

        Raises:
            _LostError: the process was lost.
            Exception: the process raised it.
        """
        if not self.process.connection.poll():
            self.process.kill()
            raise _LostError(f"a scoring process was silent for {self.patience:,.0f} s (runtime.patience_seconds)")
        try:
            answer = self.process.connection.recv()
        except (EOFError, OSError) as error:
            raise _LostError(f"a scoring process ended ({self.process.cause()})") from error
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Placed | Note):
            self._expect_answer()
            return answer if isinstance(answer, Note) else None
        if not self.is_loaded:
            self.facts, self.is_loaded = answer, True
            return None
        self.work, self.num_lost = None, 0
        return answer

    def _begin_loading(self) -> None:
        self.is_loaded, self.deadline = False, math.inf
        self.process = self.start()
        if self.process.is_placed:
            self._expect_answer()

    def _expect_answer(self) -> None:
        self.deadline = time.monotonic() + self.patience

    @staticmethod
    def _send(connection: Connection, data: bytes) -> None:
        with suppress(OSError):  # The process has ended, which is noticed when its answer is received.
            connection.send_bytes(data)


class _LocalProcess:
    """A scoring process of this machine."""

    is_placed = True

    def __init__(self, load: Callable[[], ChunkScorer]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load), daemon=True)
        self._process.start()
        theirs.close()

    def kill(self) -> None:
        self._process.kill()

    def end(self, deadline: float) -> None:
        self._process.join(max(deadline - time.monotonic(), 0))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def cause(self) -> str:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        return "killed, as the kernel does when memory runs out" if code == -signal.SIGKILL else f"exit code {code}"


def _serve(connection: Connection, load: Callable[[], ChunkScorer]) -> None:
    """Run a worker: load the model, send its properties, score every chunk received, end when the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends its workers.
    with suppress(OSError):  # The parent has closed the pipe: nobody receives the error that this caused.
        try:
            scorer = load()
            connection.send(scorer.facts)
            while True:
                connection.send(scorer.score(connection.recv(), lambda value: connection.send(Note(value))))
        except Exception as error:  # noqa: BLE001 - the parent raises it, whatever it is.
            connection.send(portable(error))


def _outcome(run: Callable[[], Result]) -> Result | NullReason:
    try:
        return run()
    except BatchTooLargeError:
        return NullReason.OUT_OF_MEMORY


def portable(error: Exception) -> Exception:
    """The error if it can be pickled and rebuilt, else a RuntimeError with its traceback as text."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled in this line.
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # noqa: BLE001, S110 - an exception that cannot be pickled or rebuilt.
        pass
    return RuntimeError("".join(traceback.format_exception(error)))
