"""ray_workers: on a real cluster of two nodes every chunk is scored once, whatever happens to an actor.

The models are fakes; actors, nodes and their ends are real.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import ray

from qaq_pipeline.lm import ray_workers
from qaq_pipeline.lm.ray_workers import ActorProcess, RayConnectionError, Resources
from qaq_pipeline.lm.workers import MAX_TRIES, Processes, ScorerFacts, WorkerDiedError, open_workers
from qaq_pipeline.schema.vocabularies import NullReason
from qaq_pipeline_tests.lm.test_workers import (
    DIE,
    EXIT,
    NAP,
    PATIENCE,
    SLEEP,
    FakeScorer,
    OnceScorer,
    SlowScorer,
    is_alive,
    load_or_fail,
    outcomes,
    pids_of,
    queue_of,
    sequence,
    wait_until_dead,
)
from qaq_pipeline_tests.support.ray_cluster import two_nodes
from qaq_pipeline_tests.support.sentences import Check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

A_GPU = Resources(1.0)


CLIENT_PORT = 26001


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with two_nodes(CLIENT_PORT) as address:
        yield address


@pytest.fixture(autouse=True)
def connected(cluster: str) -> None:
    ray_workers.connect(cluster)


def open_actors(
    loads: Sequence[Callable[[], Any]], patience: float = PATIENCE, resources: Resources = A_GPU
) -> AbstractContextManager[Processes]:
    return open_workers([functools.partial(ActorProcess, load, resources) for load in loads], patience)


class NodeScorer(FakeScorer):
    """Names its node in place of its device."""

    def __init__(self) -> None:
        super().__init__()
        node = ray.get_runtime_context().get_node_id()
        self.facts = ScorerFacts(self.facts.runner, is_padded=False, shares_prefixes=True, batch_tokens=8, device=node)


class BadNodeScorer(NodeScorer):
    """Ends over whatever it gets, on one node."""

    def __init__(self, bad: str) -> None:
        super().__init__()
        self._is_bad = self.facts.device == bad

    def _do(self, deed: int) -> None:
        if self._is_bad:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        super()._do(deed)


def test_each_actor_has_a_gpu_of_its_own_on_the_two_nodes_and_both_score() -> None:
    assert (ray_workers.num_gpus(), ray_workers.num_places(A_GPU), ray_workers.num_places(Resources(0.5))) == (2, 2, 2)
    with open_actors([NodeScorer, NodeScorer]) as workers:
        assert len({fact.device for fact in workers.facts}) == 2
        assert ray.available_resources().get("GPU", 0) == 0
        found = outcomes(workers, queue_of(*(sequence(n, 8, NAP if n < 2 else None) for n in range(30)), budget=8))
        pids = pids_of(workers)
    assert sorted(found) == list(range(30))
    wait_until_dead(pids)


def test_the_result_of_a_call_and_its_error_come_from_a_worker() -> None:
    assert ray_workers.call(os.getpid, A_GPU, PATIENCE) != os.getpid()
    with pytest.raises(ValueError, match=r"^the weights are of another model$"):
        ray_workers.call(functools.partial(load_or_fail, -10), A_GPU, PATIENCE)


@pytest.mark.parametrize("where", ["load", "score"])
@pytest.mark.parametrize(("deed", "kind"), [(-10, ValueError), (-14, ConnectionResetError), (-11, RuntimeError)])
def test_an_exception_in_an_actor_reaches_the_driver_with_its_message_and_if_it_pickles_its_type(
    where: str, deed: int, kind: type[Exception]
) -> None:
    loads = [FakeScorer, functools.partial(load_or_fail, deed) if where == "load" else FakeScorer]
    message = {-10: "the weights are of", -14: "the hub hung up", -11: "the kernel refused"}[deed]
    with pytest.raises(kind, match=message), open_actors(loads) as workers:
        list(workers.run(queue_of(sequence(0, 8, deed), sequence(1), budget=8)))


@pytest.mark.parametrize("deed", [DIE, EXIT, SLEEP, -16], ids=["killed", "ended", "hung", "broken device"])
def test_an_actor_that_is_lost_is_replaced_and_its_chunk_is_scored(
    deed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loads = [functools.partial(OnceScorer, tmp_path / "once")] * 2
    with open_actors(loads, patience=8 if deed == SLEEP else PATIENCE) as workers:
        found = outcomes(workers, queue_of(*(sequence(n, 8, deed if n == 13 else None) for n in range(20))))
        assert workers.num_lost == 1
        again = outcomes(workers, queue_of(*map(sequence, range(20, 40))))
    assert sorted([*found, *again]) == list(range(40))
    (warning,) = caplog.messages
    assert warning.endswith("; another one is started on cpu, and its chunk is scored again")


def test_a_sequence_that_ends_every_actor_is_given_up_alone() -> None:
    with open_actors([FakeScorer, FakeScorer]) as workers:
        found = outcomes(workers, queue_of(*(sequence(n, 8, DIE if n == 13 else None) for n in range(20))))
    assert [n for n, outcome in found.items() if outcome is NullReason.WORKER_LOST] == [13]
    assert sorted(found) == list(range(20))


def test_where_a_node_ends_every_actor_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    bad = ray.nodes()[1]["NodeID"]
    with open_actors([functools.partial(BadNodeScorer, bad)] * 2) as workers:
        found = outcomes(workers, queue_of(*(sequence(n, 8, NAP if n < 8 else None) for n in range(30)), budget=8))
    assert sorted(found) == list(range(30))
    assert not any(isinstance(outcome, NullReason) for outcome in found.values())
    assert f"{bad} is left out: {MAX_TRIES} processes in a row ended there" in caplog.messages[-1]


def test_notes_of_an_actor_show_that_it_is_alive() -> None:
    noted: list[Any] = []
    with open_actors([SlowScorer], patience=4) as workers:
        list(workers.run(queue_of(*map(sequence, range(5))), lambda _, note: noted.append(note)))
        assert workers.num_lost == 0
    assert noted[-1] is None
    assert noted[:-1] == sorted(noted[:-1])
    assert {0, 1, 2, 3} <= set(noted[:-1])


def test_an_actor_for_which_there_is_no_room_waits_while_others_score_and_ends_with_them() -> None:
    with open_actors([FakeScorer] * 3, patience=6) as workers:
        assert (workers.number, len(workers.facts)) == (3, 2)
        slow = (sequence(n, 8, NAP if n < 16 else None) for n in range(20))
        assert sorted(outcomes(workers, queue_of(*slow, budget=8))) == list(range(20))  # Longer than the patience.
        assert workers.num_lost == 0


def test_two_scorings_share_the_cluster_and_the_second_takes_what_becomes_free() -> None:
    found: list[int] = []

    def second() -> None:
        with open_actors([FakeScorer] * 2) as workers:
            found.extend(outcomes(workers, queue_of(*map(sequence, range(20)), budget=8)))

    with open_actors([FakeScorer] * 2) as workers:
        other = threading.Thread(target=second)
        other.start()
        list(workers.run(queue_of(*(sequence(n, 8, NAP) for n in range(4)), budget=8)))
        assert found == []
    other.join(PATIENCE)
    assert sorted(found) == list(range(20))


def test_where_no_actor_ever_gets_its_place_the_scoring_ends_and_says_what_is_missing(check_sentence: Check) -> None:
    with pytest.raises(WorkerDiedError) as error, open_actors([FakeScorer], patience=3, resources=Resources(5.0)):
        pass
    check_sentence(str(error.value).partition(", the cluster has")[0])
    assert "'GPU': 2.0" in str(error.value)
    with pytest.raises(WorkerDiedError, match=r"^no worker of the Ray cluster became free within 2 s .*'GPU': 2.0"):
        ray_workers.call(os.getpid, Resources(5.0), 2)


def test_from_outside_the_cluster_a_lost_actor_is_replaced_too(tmp_path: Path) -> None:
    ray.shutdown()
    ray_workers.connect(f"ray://127.0.0.1:{CLIENT_PORT}")
    try:
        assert (ray_workers.num_gpus(), ray_workers.num_nodes()) == (2, 2)
        assert ray_workers.call(os.getpid, A_GPU, PATIENCE) != os.getpid()
        with open_actors([functools.partial(OnceScorer, tmp_path / "once")] * 2) as workers:
            found = outcomes(workers, queue_of(*(sequence(n, 8, DIE if n == 13 else None) for n in range(20))))
            assert workers.num_lost == 1
        assert sorted(found) == list(range(20))
        with pytest.raises(ValueError, match="the weights"), open_actors([FakeScorer]) as workers:
            list(workers.run(queue_of(sequence(0, 8, -10))))
    finally:
        ray.shutdown()


def test_a_signal_is_handled_as_before_the_connection(cluster: str) -> None:
    ray.shutdown()
    before = signal.getsignal(signal.SIGTERM)
    ray_workers.connect(cluster)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_address_without_a_cluster_is_named_with_the_remedy(check_sentence: Check) -> None:
    ray.shutdown()
    with pytest.raises(RayConnectionError) as error:
        ray_workers.connect("127.0.0.1:9")
    check_sentence(str(error.value).partition(" (")[0])
    assert "ray start --head" in str(error.value)


def test_no_actor_outlives_a_scoring_that_fails() -> None:
    with open_actors([FakeScorer] * 2) as workers:
        pids = pids_of(workers)
        assert all(map(is_alive, pids))
        with pytest.raises(ValueError, match="the weights"):
            list(workers.run(queue_of(sequence(0, 8, -10))))
    wait_until_dead(pids)
