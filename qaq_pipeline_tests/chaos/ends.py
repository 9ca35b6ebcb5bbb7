"""The ways in which a command is disturbed.

Belongs here: one disturbance of one command, and what the command may say of it. Does not belong here: which command,
and how often (`campaign`).
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qaq_pipeline_tests.chaos import warm
from qaq_pipeline_tests.chaos.places import ROOM, Disk
from qaq_pipeline_tests.chaos.warm import CRASHED, Moment, Running, Warm

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_KILLED = -signal.SIGKILL
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class Attack:
    """A command, and what is needed to disturb it."""

    place: Disk
    commands: Warm
    command: Sequence[str]
    others: Sequence[Sequence[str]]
    """Commands that may run beside it."""
    seconds: float
    """That it takes undisturbed."""
    changes: int
    """Of files, undisturbed."""
    draw: random.Random

    def start(self, moment: Moment | None = None) -> Running:
        """Start the command."""
        return self.commands.start(self.command, self.place.environment, moment)

    def wait_a_while(self) -> None:
        """Wait for a part of the time that the command takes."""
        time.sleep(self.draw.uniform(0, self.seconds))

    def some_change(self, act: str) -> Moment:
        """One of the changes of files that the command makes."""
        return Moment(act, self.draw.randint(1, self.changes), str(self.place.disk))  # type: ignore[arg-type]


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
    running = attack.start(attack.some_change("kill"))
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
    running = attack.start(attack.some_change("fill"))
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
    path = attack.draw.choice(_stored_files(attack.place))
    kind = attack.draw.choice(sorted(DAMAGE))
    whole = path.read_bytes()
    damaged = DAMAGE[kind](whole, attack.draw)
    path.write_bytes(damaged)
    running = attack.start()
    code = running.wait()
    wrong = _wrong(running, code, (0, 1))
    if code == 1 and path.name not in running.output and path.parent.name not in running.output:
        wrong = (*wrong, f"{kind} {path}: the error does not name it: {_last_line(running.output)}")
    if path.exists() and path.read_bytes() == damaged:
        path.write_bytes(whole)
    return Ended(True, wrong)


ENDS: dict[str, Callable[[Attack], Ended]] = {
    "killed at a moment": killed_at_a_moment,
    "killed at a change of a file": killed_at_a_change,
    "SIGTERM, SIGINT": signalled,
    "full disk": full_disk,
    "two commands at once": two_at_once,
    "torn or flipped file": damaged_file,
}


def _stored_files(place: Disk) -> list[Path]:
    """Files of the storage that are not empty; Dagster's own databases are not ours to check."""
    root = Path(place.settings().storage_root)
    return sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)


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
