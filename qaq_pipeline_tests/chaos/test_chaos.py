"""The campaign of random ends: a short one finds nothing, and a planted loss is found."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from qaq_pipeline.publication import versions
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.chaos import story
from qaq_pipeline_tests.chaos.campaign import Campaign
from qaq_pipeline_tests.chaos.contents import differences
from qaq_pipeline_tests.chaos.ends import ENDS, Attack, Ended, flipped
from qaq_pipeline_tests.chaos.places import Disk, Servers
from qaq_pipeline_tests.chaos.warm import Warm

SEED = 7


def test_what_is_missing_added_or_changed_is_a_difference() -> None:
    expected = {"decisions/b1/table.parquet": "1", "raw_data/b1/table.parquet": "2", "scores twice": "0"}
    assert differences(expected, expected) == []
    found = {"raw_data/b1/table.parquet": "2", "raw_data/b2/table.parquet": "3", "scores twice": "4"}
    assert differences(expected, found) == [
        "decisions/b1/table.parquet: is missing",
        "raw_data/b2/table.parquet: should not be there",
        "scores twice: 4, not 0",
    ]


def test_a_flipped_bit_is_one_bit() -> None:
    assert [flipped(b"\x00\x00", bit) for bit in (0, 9)] == [b"\x01\x00", b"\x00\x02"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    config = story.write_story_settings(tmp_path / "settings.yaml", story.build_models(tmp_path / "models"))
    one = Disk(tmp_path, config)
    try:
        with one.running(), mock.patch.dict(os.environ, one.own_environment):
            yield one
    except subprocess.CalledProcessError:
        pytest.skip("no right to mount a disk")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    storage = {"root": Servers.ROOT, "locks": {"kind": "postgres"}}
    models = story.build_models(tmp_path / "models")
    one = Servers(tmp_path, story.write_story_settings(tmp_path / "settings.yaml", models, storage=storage))
    with one.running(), mock.patch.dict(os.environ, one.own_environment):
        yield one


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("place", ["disk", "servers"])
def test_random_ends_lose_nothing_and_double_nothing(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    one = request.getfixturevalue(place)
    with Warm(tmp_path) as commands:
        campaign = Campaign(one, commands, story.commands(story.deliver(tmp_path)), ends=ENDS[type(one)], seed=SEED)
        tally = campaign.run(seconds=900, ends=5)
    assert tally.wrong == []
    assert tally.compared >= 1
    assert tally.ends.total() >= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_planted_loss_and_a_planted_double_are_found(disk: Disk, tmp_path: Path) -> None:
    commands = story.commands(story.deliver(tmp_path))

    def lose_a_file(attack: Attack) -> Ended:
        """Of the published version, after the command is done: nothing makes it anew."""
        attack.start().wait()
        storage = open_storage(disk.settings())
        files, newest = storage.files, versions.latest(storage)
        assert newest is not None
        if files.exists(*(card := versions.place(newest.version, versions.CARD))):
            files.remove(*card)
        (shards,) = {files.names("score_cache")[0]}
        name = files.names("score_cache", shards, "shards")[-1]
        double = f"{int(name.partition('.')[0]) + 1:012}.parquet"
        files.write_bytes(
            files.read_bytes("score_cache", shards, "shards", name), "score_cache", shards, "shards", double
        )
        return Ended(True)

    with Warm(tmp_path) as warm:
        first = {"run": commands["run"]}
        tally = Campaign(disk, warm, first, ends={"planted": lose_a_file}, seed=SEED).run(seconds=600, ends=1)
    assert any(f"/{versions.CARD}: is missing" in line for line in tally.wrong)
    assert any("scores twice" in line for line in tally.wrong)
