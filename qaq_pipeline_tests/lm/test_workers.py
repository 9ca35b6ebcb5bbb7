"""workers: every batch once with its own scores, in this process or others, and workers that fail or die.

No tolerances: the scorer's numbers are exact. All processes are real; none imports torch.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qaq_pipeline.lm import workers as workers_module
from qaq_pipeline.lm.batching import BatchQueue, BatchTooLargeError
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.lm.workers import (
    MAX_TRIES,
    Batch,
    BrokenDeviceError,
    Outcome,
    Processes,
    ScorerFacts,
    Scores,
    WorkerDiedError,
    open_processes,
    open_workers,
    score_batches,
)
from qaq_pipeline.schema.vocabularies import NullReason, Quantity

BATCH_TOKENS = 40
MEMORY_TOKENS = 100
"""Number of tokens that fit into the scorer's memory."""
PATIENCE = 60.0
"""Seconds to wait for a process to end."""

NAP, SLEEP, DIE, EXIT, WHO = range(-5, 0)
"""Token ids that make the scorer do something else first."""


class TwoPartError(Exception):
    """Can be pickled, but not rebuilt: its only argument is not one of the constructor's."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path}, line {line}: torn")


class HoldingError(Exception):
    """Cannot be pickled: it holds a lock."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class RewordingError(Exception):
    """Can be pickled and rebuilt, but then has another message."""

    def __init__(self, name: str) -> None:
        super().__init__(f"cannot find {name}")


ERRORS: dict[int, Callable[[], Exception]] = {
    -10: lambda: ValueError("the weights are of another model"),
    -11: lambda: HoldingError("the kernel refused"),
    -12: lambda: TwoPartError("model.safetensors", 7),
    -13: lambda: EOFError("Ran out of input"),
    -14: lambda: ConnectionResetError("the hub hung up"),
    -15: lambda: RewordingError("config.json"),
    -16: lambda: BrokenDeviceError("CUDA error: an illegal memory access was encountered"),
}
"""Errors by the token id that makes the scorer raise them."""


class FakeScorer:
    """A fake model: ln p of a token is its id over -8. The class itself is a picklable loader."""

    def __init__(self) -> None:
        self.facts = ScorerFacts(
            runner=str(os.getpid()), is_padded=False, shares_prefixes=True, batch_tokens=BATCH_TOKENS
        )

    def score(self, sequences: Sequence[TokenSequence], note: Callable[[Any], None] = lambda _: None) -> Scores:
        note(len(sequences))
        for deed in (sequence.token_ids[0] for sequence in sequences):
            self._do(deed)
        if sum(len(sequence.token_ids) for sequence in sequences) > MEMORY_TOKENS and sequences[0].token_ids[0] >= 0:
            raise BatchTooLargeError
        return scores_of(sequences)

    def _do(self, deed: int) -> None:
        if deed == NAP:
            print("busy", flush=True)
            time.sleep(1)
        elif deed == SLEEP:
            time.sleep(600)
        elif deed == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == EXIT:
            sys.exit(3)
        elif deed in ERRORS:
            raise ERRORS[deed]()


class FakeAheadScorer(FakeScorer):
    """Starts a batch, whose scores or whose error come at once or when they are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, int]] = []

    def begin(self, sequences: Sequence[TokenSequence]) -> Callable[[], Scores]:
        number = number_of(sequences[0])
        self.said.append(("begin", number))
        is_late = sum(len(sequence.token_ids) for sequence in sequences) % 3 == 0
        scores = None if is_late else self.score(sequences)

        def finish() -> Scores:
            self.said.append(("end", number))
            return scores if scores is not None else self.score(sequences)

        return finish


def load_or_fail(deed: int) -> FakeScorer:
    """A loader that raises."""
    raise ERRORS[deed]()


def scores_of(sequences: Sequence[TokenSequence]) -> list[list[np.ndarray]]:
    """The expected scores; for a sequence with WHO, the id of the process."""
    return [
        [
            np.array([os.getpid()] if one.token_ids[0] == WHO else one.token_ids[t.start : t.stop]) / -8
            for t in one.targets
        ]
        for one in sequences
    ]


def sequence(number: int, length: int = 8, deed: int | None = None) -> TokenSequence:
    """A sequence with unique scores."""
    token_ids = [number * 1000 + position for position in range(length)]
    if deed is not None:
        token_ids[0] = deed
    targets = (Target(Quantity.Q_GIVEN_A, length - 1, length), Target(Quantity.A, 1, length - 1))
    return TokenSequence(f"{number:032x}", token_ids, targets)


class Queue(BatchQueue):
    """Batches as chunks."""

    def after_loss(self, chunk: Sequence[TokenSequence]) -> Sequence[TokenSequence]:
        return chunk


class InThisProcess:
    """A model in this process, as processes are used."""

    def __init__(self) -> None:
        self._scorer = FakeScorer()
        self.facts = [self._scorer.facts]

    def run(self, queue: Queue) -> Iterator[tuple[Batch, Outcome]]:
        return score_batches(self._scorer, queue)


Workers = InThisProcess | Processes


def queue_of(*sequences: TokenSequence, budget: int = BATCH_TOKENS) -> Queue:
    return Queue([sequences], budget, is_padded=False)


def number_of(one: TokenSequence) -> int:
    return int(one.pair_id, 16)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_dead(pids: Sequence[int]) -> None:
    end = time.monotonic() + PATIENCE
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.02)


def pids_of(workers: Workers) -> list[int]:
    return [int(fact.runner) for fact in workers.facts]


def assert_scored(batch: Sequence[TokenSequence], scores: Outcome) -> None:
    assert not isinstance(scores, NullReason)
    expected = scores_of(batch)
    assert len(scores) == len(batch)
    for ours, theirs in zip(scores, expected, strict=True):
        assert [values.tolist() for values in ours] == [values.tolist() for values in theirs]


@pytest.fixture(autouse=True)
def processes_left() -> Iterator[Callable[[], set[Any]]]:
    """The processes that the test started and that still run; none may be left at its end."""
    before = set(multiprocessing.active_children())

    def new() -> set[Any]:
        return set(multiprocessing.active_children()) - before

    yield new
    for process in new():
        process.kill()
        process.join()


@pytest.fixture(scope="module", params=[1, 2], ids=["in_this_process", "in_two_processes"])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """Workers shared by several tests."""
    if request.param == 1:
        yield InThisProcess()
        return
    with open_processes([FakeScorer] * request.param) as opened:
        yield opened


# --- batches and scores ----------------------------------------------------------------------------------------------


def test_each_model_has_a_process_of_its_own(workers: Workers) -> None:
    pids = pids_of(workers)
    assert [fact.batch_tokens for fact in workers.facts] == [BATCH_TOKENS] * len(pids)
    assert len(set(pids)) == len(pids)
    assert all(map(is_alive, pids))
    assert (os.getpid() in pids) == (len(pids) == 1)


def test_every_batch_comes_once_with_its_own_scores(workers: Workers) -> None:
    windows = [[sequence(number, 2 + number % 9) for number in range(60)], [], [sequence(n) for n in range(60, 70)]]
    queue = Queue(windows, BATCH_TOKENS, is_padded=False)
    expected = Queue(windows, BATCH_TOKENS, is_padded=False)
    batches = []
    for batch, scores in workers.run(queue):
        assert_scored(batch, scores)
        batches.append([number_of(one) for one in batch])
    assert sorted(batches) == sorted([number_of(one) for one in batch] for batch in iter(expected.take, []))
    assert sorted(itertools.chain(*batches)) == list(range(70))


def test_an_empty_queue_gives_nothing(workers: Workers) -> None:
    assert list(workers.run(Queue([], BATCH_TOKENS, is_padded=False))) == []
    assert list(workers.run(Queue([[], []], BATCH_TOKENS, is_padded=False))) == []


def test_every_worker_gets_batches(workers: Workers) -> None:
    results = list(workers.run(queue_of(*(sequence(number, 8, WHO) for number in range(6)), budget=8)))
    who = {float(values[0]) * -8 for _, scores in results if not isinstance(scores, NullReason) for values in scores[0]}
    assert len(results) == 6
    assert who == set(pids_of(workers))


@pytest.mark.parametrize("kind", [FakeScorer, FakeAheadScorer])
def test_a_batch_that_does_not_fit_says_so_and_comes_again_when_it_was_split(kind: type[FakeScorer]) -> None:
    """Twenty sequences of 16 tokens in batches of up to 12; 100 tokens fit. The last one alone is too long."""
    queue = queue_of(*(sequence(number, 16) for number in range(20)), sequence(20, 101), budget=200)
    scored, failed, num_splits = [], [], 0
    for batch, scores in score_batches(kind(), queue):
        if sum(len(one.token_ids) for one in batch) <= MEMORY_TOKENS:
            assert_scored(batch, scores)
            scored += map(number_of, batch)
        else:
            assert scores is NullReason.OUT_OF_MEMORY
            if queue.split(batch):
                num_splits += 1
            else:
                failed += map(number_of, batch)
    assert sorted(scored) == list(range(20))
    assert failed == [20]
    assert num_splits


def test_the_next_batch_is_started_before_the_outcome_of_one_is_waited_for() -> None:
    scorer = FakeAheadScorer()
    found = [number_of(batch[0]) for batch, _ in score_batches(scorer, queue_of(*map(sequence, range(3)), budget=8))]
    assert found == [0, 1, 2]
    begun_and_ended = [("begin", 0), ("begin", 1), ("end", 0), ("begin", 2), ("end", 1), ("end", 2)]
    assert scorer.said == begun_and_ended
    assert list(score_batches(scorer, queue_of())) == []


def test_an_error_at_the_start_of_a_batch_loses_no_scores_of_the_one_before() -> None:
    batches = score_batches(FakeAheadScorer(), queue_of(sequence(0), sequence(1, 8, -11), budget=8))
    batch, scores = next(batches)
    assert_scored(batch, scores)
    with pytest.raises(HoldingError, match=r"^the kernel refused$"):
        next(batches)


def test_batches_larger_than_a_pipe_holds_pass_through_it_both_ways(workers: Workers) -> None:
    huge = [sequence(number, 200_000, WHO) for number in range(4)]
    assert all(len(pickle.dumps(one)) > 2**18 for one in huge)
    results = list(workers.run(queue_of(*huge)))
    assert sorted(number_of(batch[0]) for batch, _ in results) == [0, 1, 2, 3]


def test_a_ctrl_c_is_the_parent_s_to_answer(workers: Workers) -> None:
    for pid in set(pids_of(workers)) - {os.getpid()}:
        os.kill(pid, signal.SIGINT)
    results = list(workers.run(queue_of(*(sequence(number) for number in range(10)), budget=8)))
    assert sorted(number_of(batch[0]) for batch, _ in results) == list(range(10))


def test_a_run_that_nobody_finished_leaves_no_scores_to_the_next() -> None:
    with open_processes([FakeScorer, FakeScorer]) as workers:
        next(workers.run(queue_of(*map(sequence, range(4)), budget=8)))
        with pytest.raises(RuntimeError, match="the previous queue was not run to its end"):
            next(workers.run(queue_of(*map(sequence, range(10, 16)), budget=8)))


# --- failures --------------------------------------------------------------------------------------------------------


def test_an_exception_in_this_process_is_raised_as_it_is() -> None:
    with pytest.raises(HoldingError, match=r"^the kernel refused$"):
        list(score_batches(FakeScorer(), queue_of(sequence(0, 8, -11))))


@pytest.mark.parametrize(
    ("where", "deed", "kind", "message"),
    [
        pytest.param("load", -10, ValueError, r"^the weights are of another model$", id="in load"),
        pytest.param("score", -10, ValueError, r"^the weights are of another model$", id="in score"),
        pytest.param(
            "score", -11, RuntimeError, r"(?s)Traceback .*in _do\b.*Error: the kernel refused", id="pickles not"
        ),
        pytest.param("load", -12, RuntimeError, r"(?s)Traceback .*in load_or_fail\b.*, line 7: torn", id="builds not"),
        pytest.param("load", -13, EOFError, r"^Ran out of input$", id="EOF in load"),
        pytest.param("score", -14, ConnectionResetError, r"^the hub", id="reset in score"),
        pytest.param("load", -15, Exception, r"(?<!find )cannot find co", id="says else"),
    ],
)
def test_an_exception_in_a_worker_reaches_the_parent_with_its_type_and_message(
    where: str, deed: int, kind: type[Exception], message: str, processes_left: Callable[[], set[Any]]
) -> None:
    loads = [FakeScorer, functools.partial(load_or_fail, deed) if where == "load" else FakeScorer]
    with pytest.raises(kind, match=message) as caught, open_processes(loads) as workers:
        list(workers.run(queue_of(sequence(0, 8, deed), sequence(1), budget=8)))
    assert kind is Exception or caught.type is kind
    assert processes_left() == set()


# --- lost workers ----------------------------------------------------------------------------------------------------


class OnceScorer(FakeScorer):
    """Ends, hangs or breaks its device over a sequence with that deed, once."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self._mark = mark

    def _do(self, deed: int) -> None:
        if deed < 0 and not self._mark.exists():
            self._mark.touch()
            super()._do(deed)


class BadScorer(FakeScorer):
    """Ends over whatever it gets, after a while in which another can take something."""

    def score(self, sequences: Sequence[TokenSequence], note: Callable[[Any], None] = lambda _: None) -> Scores:
        note(len(sequences))
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(f"{len(sequences)} sequences outlived it")


def outcomes(workers: Processes, queue: Queue) -> dict[int, Outcome]:
    """The outcome of each sequence, each of which comes once; scores are as expected."""
    found: dict[int, Outcome] = {}
    for batch, outcome in workers.run(queue):
        if not isinstance(outcome, NullReason):
            assert_scored(batch, outcome)
        assert not found.keys() & set(map(number_of, batch))
        found |= dict.fromkeys(map(number_of, batch), outcome)
    return found


@pytest.mark.parametrize(
    ("deed", "cause"),
    [
        pytest.param(DIE, "a scoring process ended (killed, as the kernel does when memory runs out)", id="killed"),
        pytest.param(EXIT, "a scoring process ended (exit code 3)", id="ended"),
        pytest.param(SLEEP, "a scoring process was silent for 5 s (runtime.patience_seconds)", id="hung"),
        pytest.param(-16, "CUDA error: an illegal memory access was encountered", id="broken device"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_worker_that_is_lost_is_replaced_and_its_batch_is_scored(
    deed: int, cause: str, number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loads = [functools.partial(OnceScorer, tmp_path / "once")] * number
    with open_processes(loads, patience=5 if deed == SLEEP else PATIENCE) as workers:
        assert os.getpid() not in pids_of(workers)
        found = outcomes(workers, queue_of(*(sequence(n, 8, deed if n == 13 else None) for n in range(20))))
        assert workers.num_lost == 1
        again = outcomes(workers, queue_of(*map(sequence, range(20, 40))))
    assert sorted([*found, *again]) == list(range(40))
    assert caplog.messages == [f"{cause}; another one is started on cpu, and its chunk is scored again"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_sequence_that_ends_every_worker_is_given_up_alone(number: int) -> None:
    with open_processes([FakeScorer] * number) as workers:
        found = outcomes(workers, queue_of(*(sequence(n, 8, DIE if n == 13 else None) for n in range(20))))
        assert workers.num_lost <= MAX_TRIES + 3  # Five sequences of a batch are halved three times.
    assert [n for n, outcome in found.items() if outcome is NullReason.WORKER_LOST] == [13]
    assert sorted(found) == list(range(20))


def test_notes_of_a_process_reach_the_parent_and_show_that_it_is_alive() -> None:
    noted: list[tuple[int, Any]] = []
    with open_processes([SlowScorer], patience=4) as workers:
        list(workers.run(queue_of(*map(sequence, range(5))), lambda number, note: noted.append((number, note))))
        assert workers.num_lost == 0
    assert noted == [*((0, number) for number in range(6)), (0, None)]


class SlowScorer(FakeScorer):
    """Takes longer than the patience of its parent, and notes that it is alive."""

    def score(self, sequences: Sequence[TokenSequence], note: Callable[[Any], None] = lambda _: None) -> Scores:
        for number in range(6):
            note(number)
            time.sleep(1)
        return scores_of(sequences)


def test_a_device_that_keeps_failing_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with open_processes([BadScorer, FakeScorer]) as workers:
        sequences = [sequence(n, 8, NAP if n < 6 else None) for n in range(30)]
        found = outcomes(workers, queue_of(*sequences, budget=8))
        assert workers.num_lost == MAX_TRIES
    assert sorted(found) == list(range(30))
    assert not any(isinstance(outcome, NullReason) for outcome in found.values())
    assert caplog.messages[-1].endswith("; cpu is left out: 3 processes in a row ended there")


@pytest.mark.slow
def test_where_every_device_keeps_failing_the_scoring_ends_and_says_why() -> None:
    with (
        pytest.raises(WorkerDiedError, match=r"^a scoring process ended \(killed.*run again, with a smaller"),
        open_processes([BadScorer, BadScorer]) as workers,
    ):
        list(workers.run(queue_of(*map(sequence, range(20)), budget=8)))


def test_a_worker_that_ends_while_it_loads_its_model_is_tried_three_times(caplog: pytest.LogCaptureFixture) -> None:
    with open_processes([FakeScorer, leave]) as workers:
        assert workers.num_lost == MAX_TRIES
        assert workers.number == 1
        assert sorted(outcomes(workers, queue_of(*map(sequence, range(20))))) == list(range(20))
    assert caplog.messages[-1].endswith("; its device is left out: 3 processes in a row ended there")
    with pytest.raises(WorkerDiedError, match=r"ended \(exit code 3\).*run again"), open_processes([leave]):
        pass


def test_a_worker_that_does_not_take_its_chunk_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with open_processes([FakeScorer] * 2, patience=5) as workers:
        os.kill(pids_of(workers)[0], signal.SIGSTOP)
        huge = [sequence(number, 200_000, NAP) for number in range(6)]  # Larger than a pipe holds.
        assert sorted(outcomes(workers, queue_of(*huge))) == list(range(6))
        assert workers.num_lost == 1
    assert caplog.messages[0].startswith("a scoring process was silent for 5 s")


class Roomless:
    """A process that gets no place."""

    is_placed = False

    def __init__(self) -> None:
        self.connection, self._theirs = multiprocessing.Pipe()

    def kill(self) -> None:
        """Nothing runs."""

    def end(self, deadline: float) -> None:
        """Nothing runs."""

    def cause(self) -> str:
        return "there is no room"


@pytest.mark.slow
def test_where_the_last_process_is_lost_and_no_other_gets_its_place_the_scoring_ends(tmp_path: Path) -> None:
    load = functools.partial(OnceScorer, tmp_path / "once")
    starts: list[Callable[[], Any]] = [Roomless, lambda: workers_module._LocalProcess(load)]

    def start() -> Any:
        return starts.pop()()

    queue = queue_of(*(sequence(n, 8, EXIT if n == 3 else None) for n in range(8)))
    with (
        pytest.raises(WorkerDiedError, match=r"^no scoring process got a .* within 8 s .*: there is no room$"),
        open_workers([start], 8) as workers,
    ):
        list(workers.run(queue))


def test_what_one_place_lost_is_done_there_again_where_no_other_has_a_place(tmp_path: Path) -> None:
    load = functools.partial(OnceScorer, tmp_path / "once")
    starts: list[Callable[[], Any]] = [lambda: workers_module._LocalProcess(load), Roomless]
    with open_workers(starts, PATIENCE) as workers:
        found = outcomes(workers, queue_of(*(sequence(n, 8, DIE if n == 3 else None) for n in range(8))))
    assert sorted(found) == list(range(8))


def leave() -> FakeScorer:
    """A loader that ends its process."""
    sys.exit(3)


def test_a_worker_killed_while_it_was_idle_is_replaced() -> None:
    with open_processes([FakeScorer, FakeScorer]) as workers:
        pids = pids_of(workers)
        os.kill(pids[0], signal.SIGKILL)
        wait_until_dead(pids[:1])
        assert sorted(outcomes(workers, queue_of(*map(sequence, range(6)), budget=8))) == list(range(6))
        assert workers.num_lost == 1
        assert is_alive(pids[1])
    assert not any(map(is_alive, pids))


# --- the end ---------------------------------------------------------------------------------------------------------


def test_leaving_ends_all_workers_for_whatever_reason_and_even_one_amid_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers_module, "_END_SECONDS", 0.3)
    with pytest.raises(KeyboardInterrupt), open_processes([FakeScorer, FakeScorer]) as workers:  # noqa: PT012
        pids = pids_of(workers)
        results = workers.run(queue_of(sequence(0, 9, SLEEP), sequence(1), budget=9))
        assert number_of(next(results)[0][0]) == 1
        assert all(map(is_alive, pids))
        started = time.monotonic()
        raise KeyboardInterrupt
    assert not any(map(is_alive, pids))
    assert time.monotonic() - started < PATIENCE


def test_a_worker_that_cannot_be_started_ends_those_that_were(processes_left: Callable[[], set[Any]]) -> None:
    with (
        pytest.raises((AttributeError, pickle.PicklingError)),
        open_processes([FakeScorer, lambda: load_or_fail(-10)]),  # A lambda cannot be pickled.
    ):
        pass
    assert processes_left() == set()


PARENT = """
from qaq_pipeline.lm.workers import open_processes
from qaq_pipeline_tests.lm.test_workers import NAP, FakeScorer, pids_of, queue_of, sequence

with open_processes([FakeScorer, FakeScorer]) as workers:
    print(*pids_of(workers), flush=True)
    for _ in workers.run(queue_of(sequence(0, 8, NAP))):
        print("not killed", flush=True)
"""
"""A parent with one worker in the middle of a batch of one second, and one idle worker."""


def test_workers_end_by_themselves_when_their_parent_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PARENT]
    pids: list[int] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as parent:
        try:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert parent.stdout.readline() == "busy\n"
            assert len(pids) == 2
            assert all(map(is_alive, pids))
            parent.kill()
            assert parent.wait(PATIENCE) == -signal.SIGKILL
            wait_until_dead(pids)
            output, errors = parent.communicate(timeout=PATIENCE)  # Ends when no process holds the pipes.
        finally:
            parent.kill()
            for pid in filter(is_alive, pids):
                os.kill(pid, signal.SIGKILL)
    assert (output, errors) == ("", "")
