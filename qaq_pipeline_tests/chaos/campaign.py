"""A campaign: commands are disturbed at random, given again until they are done, and what they made is compared.

Belongs here: the order of things, and the counts. Does not belong here: the disturbances (`ends`), and the comparison
(`contents`).
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from qaq_pipeline_tests.chaos.contents import Contents, contents, differences, faults
from qaq_pipeline_tests.chaos.ends import Attack, Ended
from qaq_pipeline_tests.chaos.places import Place
from qaq_pipeline_tests.chaos.warm import Warm

_GO_ON = 0.7
"""Probability that a disturbed command is disturbed again, before it may end."""
_MOST_TRIES = 3
"""Undisturbed tries until a command has to be done: what was lost with a killed process may first be found and said."""
_START = "start"


@dataclass(frozen=True)
class Undisturbed:
    """A command that nobody disturbed."""

    before: str
    """The copy of the place that it began with."""
    contents: Contents
    """Of the place that it left."""
    seconds: float
    counts: Mapping[str, int]


@dataclass
class Tally:
    """What came of a campaign."""

    ends: Counter[str] = field(default_factory=Counter)
    """Disturbed commands by kind of the disturbance."""
    over_before: Counter[str] = field(default_factory=Counter)
    """Commands that were over before they were disturbed."""
    by_command: Counter[str] = field(default_factory=Counter)
    """Disturbed commands by name."""
    compared: int = 0
    """Commands that were done in the end, and whose results were compared."""
    wrong: list[str] = field(default_factory=list)
    """What was wrong, with the seed and the number of the attack."""


class Campaign:
    """Attacks on one place.

    Args:
        place: where the commands keep what they make, empty.
        commands: forks them.
        story: the commands in order, by name.
        ends: disturbances by name.
        seed: of the draws.
        on_attack: called with a line for a person after each attack.
    """

    def __init__(
        self,
        place: Place,
        commands: Warm,
        story: dict[str, list[str]],
        *,
        ends: Mapping[str, Callable[[Attack], Ended]],
        seed: int = 0,
        on_attack: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._place, self._commands, self._story = place, commands, story
        self._ends, self._seed, self._on_attack = ends, seed, on_attack
        self.tally = Tally()

    def run(self, *, seconds: float, ends: int) -> Tally:
        """Attack until that much time has passed, or that many commands were disturbed."""
        until = time.monotonic() + seconds
        undisturbed = self._rehearse()
        number = 0
        while time.monotonic() < until and self.tally.ends.total() < ends:
            number += 1
            self._attack(number, undisturbed)
        return self.tally

    def _rehearse(self) -> dict[str, Undisturbed]:
        """Give every command once, undisturbed."""
        found: dict[str, Undisturbed] = {}
        before = _START
        self._place.keep(before)
        for name, command in self._story.items():
            started = time.monotonic()
            start = partial(self._commands.start, command, self._place.environment)
            running, code, counts = self._place.counted(start)
            if code != 0:
                raise RuntimeError(f"{name} fails undisturbed: {running.output}")
            seconds = time.monotonic() - started
            found[name] = Undisturbed(before, contents(self._place.settings()), seconds, counts)
            before = name
            self._place.keep(before)
            self._on_attack(f"{name}: {seconds:.1f} s, undisturbed, {counts}")
        return found

    def _attack(self, number: int, undisturbed: dict[str, Undisturbed]) -> None:
        """Disturb a command until chance has it end, let it end, and compare."""
        draw = random.Random(f"{self._seed}-{number}")
        name = draw.choice(list(self._story))
        whole = undisturbed[name]
        others = [["status"], ["refresh"]]
        attack = Attack(self._place, self._commands, self._story[name], others, whole.seconds, whole.counts, draw)
        self._place.put_back(whole.before)
        done, wrong = [], []
        while not done or draw.random() < _GO_ON:
            attack = dataclasses.replace(attack, left=1 / (1 + len(done)))
            kind = draw.choice(list(self._ends))
            ended = self._ends[kind](attack)
            (self.tally.ends if ended.was_disturbed else self.tally.over_before)[kind] += 1
            self.tally.by_command[name] += ended.was_disturbed
            done.append(kind)
            wrong += [f"{kind}: {line}" for line in ended.wrong]
            if not ended.was_disturbed:
                break  # The command is done.
        wrong += self._finish(attack, whole)
        self.tally.compared += 1
        told = [f"seed {self._seed}, attack {number}, {name}, {'; '.join(done)}: {line}" for line in wrong]
        self.tally.wrong += told
        self._on_attack("\n".join(told) or f"attack {number}: {name}: {'; '.join(done)}")

    def _finish(self, attack: Attack, whole: Undisturbed) -> list[str]:
        """Give the command undisturbed, and compare what it made; what is wrong, a line each."""
        said = []
        for _ in range(_MOST_TRIES):
            running = attack.start()
            code = running.wait()
            if code == 0:
                settings = self._place.settings()
                return [*differences(whole.contents, contents(settings)), *faults(settings)]
            said.append(running.output[-2000:])
        return [f"it is never done: {said}"]
