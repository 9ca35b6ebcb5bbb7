"""The ways in which a command is disturbed.

Belongs here: one disturbance of one command, and what the command may say of it. Does not belong here: which command,
and how often (`campaign`).
"""

from __future__ import annotations

import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.chaos import warm
from qaq_pipeline_tests.chaos.places import ROOM, Disk, Place, Servers
from qaq_pipeline_tests.chaos.proxies import Fault, Plan
from qaq_pipeline_tests.chaos.warm import CRASHED, Moment, Running, Warm

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_KILLED = -signal.SIGKILL
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class Attack:
    """A command, and what is needed to disturb it."""

    place: Place
    commands: Warm
    command: Sequence[str]
    others: Sequence[Sequence[str]]
    """Commands that may run beside it."""
    seconds: float
    """That it takes undisturbed."""
    counts: Mapping[str, int]
    """How often each thing happens at which it can be disturbed."""
    draw: random.Random
    left: float = 1.0
    """About what part of the work is left."""

    def start(self, moment: Moment | None = None) -> Running:
        """Start the command."""
        return self.commands.start(self.command, self.place.environment, moment)

    def wait_a_while(self) -> None:
        """Wait for a part of the time that the command takes."""
        time.sleep(self.draw.uniform(0, self.seconds * self.left))

    def some(self, what: str) -> int:
        """The number of one of the things that happen."""
        return self.draw.randint(1, max(1, int(self.counts[what] * self.left)))


@dataclass(frozen=True)
class Ended:
    """How a disturbed command ended."""

    was_disturbed: bool
    """False: it was over before."""
    wrong: tuple[str, ...] = ()
    """What is wrong with how it ended, a line each."""


def killed_at_a_moment(attack: Attack) -> Ended:
    """SIGKILL to the command and its children."""
    running = attack.start()
    attack.wait_a_while()
    running.send(signal.SIGKILL)
    code = running.wait()
    return Ended(code == _KILLED, _wrong(running, code, (0, _KILLED)))


def killed_at_a_change(attack: Attack) -> Ended:
    """SIGKILL immediately before a change of a file."""
    assert isinstance(attack.place, Disk)
    running = attack.start(Moment("kill", attack.some("changes"), str(attack.place.disk)))
    code = running.wait()
    return Ended(code == _KILLED, _wrong(running, code, (0, _KILLED)))


def signalled(attack: Attack) -> Ended:
    """SIGTERM or Ctrl-C's signal."""
    number = attack.draw.choice((signal.SIGTERM, signal.SIGINT))
    running = attack.start()
    attack.wait_a_while()
    running.send(number)
    code = running.wait()
    # Before its first stage, a command has no handler: the signal itself ends it.
    return Ended(code != 0, _wrong(running, code, (0, 128 + number, -number)))


def full_disk(attack: Attack) -> Ended:
    """No free byte on the disk from a change of a file on; there is room again afterwards."""
    assert isinstance(attack.place, Disk)
    running = attack.start(Moment("fill", attack.some("changes"), str(attack.place.disk)))
    code = running.wait()
    wrong = _wrong(running, code, (0, 1))
    if code == 1 and "is full" not in running.output:
        wrong = (*wrong, f"the error does not name the full disk: {_last_line(running.output)}")
    warm.resize(attack.place.disk, ROOM)
    return Ended(code != 0, wrong)


def two_at_once(attack: Attack) -> Ended:
    """The same command twice, or another one beside it."""
    others = [attack.command, *attack.others]
    running = attack.start()
    attack.wait_a_while()
    other = attack.commands.start(attack.draw.choice(others), attack.place.environment)
    codes = running.wait(), other.wait()
    wrong = [_wrong(one, code, (0, 1)) for one, code in zip((running, other), codes, strict=True)]
    return Ended(True, (*wrong[0], *wrong[1]))


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "torn": lambda data, draw: data[: draw.randrange(len(data))],
    "flipped": lambda data, draw: flipped(data, draw.randrange(len(data) * 8)),
}


def flipped(data: bytes, bit: int) -> bytes:
    """The same bytes but for one bit."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damaged_file(attack: Attack) -> Ended:
    """A stored file is torn, or one of its bits flipped, before the command; afterwards it is restored.

    A person restores it from a backup, unless the command made it anew, which is told by its content.
    """
    files = open_storage(attack.place.settings()).files
    stored = [one for one in files.files_below() if files.size(*one.split("/"))]
    if not stored:
        return Ended(was_disturbed=False)
    name = attack.draw.choice(stored)
    place = tuple(name.split("/"))
    kind = attack.draw.choice(sorted(DAMAGE))
    whole = files.read_bytes(*place)
    damaged = DAMAGE[kind](whole, attack.draw)
    files.write_bytes(damaged, *place)
    running = attack.start()
    code = running.wait()
    wrong = [f"{kind} {name}: {line}" for line in _wrong(running, code, (0, 1))]
    if code == 1 and place[-1] not in running.output:
        wrong.append(f"{kind} {name}: the error does not name it: {_last_line(running.output)}")
    if files.exists(*place) and files.read_bytes(*place) == damaged:
        files.write_bytes(whole, *place)
    return Ended(True, tuple(wrong))


def killed_worker(attack: Attack) -> Ended:
    """SIGKILL to a process that the command has started, such as one that scores; the command goes on."""
    running = attack.start()
    attack.wait_a_while()
    try:
        children = psutil.Process(running.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    if children:
        attack.draw.choice(children).kill()
    code = running.wait()
    return Ended(bool(children), _wrong(running, code, (0,)))


def stepped_clock(attack: Attack) -> Ended:
    """The clock steps at a change of a file, by up to a month, and is right again for the next command."""
    assert isinstance(attack.place, Disk)
    running = attack.start(Moment("step", attack.some("changes"), str(attack.place.disk)))
    code = running.wait()
    return Ended(True, _wrong(running, code, (0,)))


def failing_store(attack: Attack) -> Ended:
    """The store answers 500, loses answers or cuts them, once or some times in a row."""
    assert isinstance(attack.place, Servers)
    faults: tuple[Fault, ...] = ("answer 500", "lose the answer", "cut the answer")
    plan = Plan(attack.draw.choice(faults), attack.some("requests"), attack.draw.choice((1, 3, 30)))
    attack.place.proxies.expect(plan)
    running = attack.start()
    code = running.wait()
    is_disturbed = attack.place.proxies.num_requests >= plan.number
    attack.place.proxies.expect()
    return Ended(is_disturbed, tuple(f"{plan.fault}: {line}" for line in _wrong(running, code, (0, 1))))


def lost_database(attack: Attack) -> Ended:
    """All connections of the database are cut, and none can be made for a while."""
    assert isinstance(attack.place, Servers)
    proxies, number = attack.place.proxies, attack.some("messages")
    proxies.expect(cut_at=number)
    back = threading.Timer(attack.seconds + attack.draw.uniform(0, 5), proxies.let_in)
    running = attack.start()
    back.start()
    code = running.wait()
    back.join()
    is_disturbed = proxies.num_messages >= number
    proxies.expect()
    return Ended(is_disturbed, _wrong(running, code, (0, 1)))


def killed_at_a_request(attack: Attack) -> Ended:
    """SIGKILL immediately before a request to the store."""
    assert isinstance(attack.place, Servers)
    started: list[Running] = []
    plan = Plan("call", attack.some("requests"), call=lambda: started[0].send(signal.SIGKILL))
    attack.place.proxies.expect(plan)
    started.append(attack.start())
    code = started[0].wait()
    attack.place.proxies.expect()
    return Ended(code == _KILLED, _wrong(started[0], code, (0, _KILLED)))


_ANYWHERE: dict[str, Callable[[Attack], Ended]] = {
    "killed at a moment": killed_at_a_moment,
    "SIGTERM, SIGINT": signalled,
    "two commands at once": two_at_once,
    "torn or flipped file": damaged_file,
}
ENDS: dict[type, dict[str, Callable[[Attack], Ended]]] = {
    Disk: {
        **_ANYWHERE,
        "killed at a change of a file": killed_at_a_change,
        "full disk": full_disk,
        "stepped clock": stepped_clock,
    },
    Servers: {
        **_ANYWHERE,
        "killed at a request": killed_at_a_request,
        "failing store": failing_store,
        "lost database": lost_database,
    },
}
"""Disturbances by name, for each kind of place. Dagster's own databases are damaged nowhere: they are not ours."""
OF_WORKERS = {"killed worker": killed_worker, "killed at a moment": killed_at_a_moment}
"""Disturbances of commands that score in processes of their own."""


def _wrong(running: Running, code: int, allowed: Sequence[int]) -> tuple[str, ...]:
    """What is wrong with how a command ended: its code, a traceback, no line for a person."""
    output = _COLOUR.sub("", running.output)
    if code == CRASHED or "Traceback" in output:
        return (f"code {code}, with a traceback: {json.dumps(output[-3000:])}",)
    if code not in allowed:
        return (f"ended with code {code}: {_last_line(output)}",)
    if code == 1 and "\nerror: " not in f"\n{output}":
        return (f"code 1 without an error in one line: {json.dumps(output[-1000:])}",)
    return ()


def _last_line(output: str) -> str:
    return ([line for line in _COLOUR.sub("", output).splitlines() if line.strip()] or [""])[-1].strip()
