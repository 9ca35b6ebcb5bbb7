"""Commands that change what is stored or published: refresh, withdraw, publish, cache."""

from __future__ import annotations

from typing import Annotated

import typer

from qaq_pipeline.cli import render
from qaq_pipeline.cli.terminal import (
    ConfigOption,
    expected,
    fail,
    open_deployment,
    open_stored,
    say,
    warn,
)
from qaq_pipeline.publication import hub, versions

_SHORTEST_KEY = 6


def refresh(config_file: ConfigOption = None) -> None:
    """Rebuild what is stale in every batch, and publish if something changed. The nightly job does the same."""
    from qaq_pipeline.runs.refresh import refresh_all

    with open_deployment(config_file) as deployment, render.progress_display() as events:
        done = refresh_all(deployment, events)
    say(f"{done.sentence}.")


def withdraw(
    what: Annotated[str, typer.Argument(help="A batch, or one of its rows: BATCH/FILE:ROW, BATCH/FILE:ROW.TURN.")],
    reason: Annotated[
        str, typer.Option("--reason", help="The reason. It is stored permanently, and shown for every withdrawn row.")
    ],
    restore: Annotated[bool, typer.Option("--restore", help="Revoke the withdrawal.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Withdraw a batch, or a row's text in every batch, and publish a version without it. Older versions keep it."""
    from qaq_pipeline.runs import withdrawal

    batch, slash, row = what.partition("/")
    if slash and not row:
        fail(f"{what!r} names no row after the '/'; the whole batch is {batch!r}", code=2)
    meant = withdrawal.Withdrawal(batch, row or None, reason, is_withdrawn=not restore)
    with open_deployment(config_file) as deployment:
        try:
            near = withdrawal.near_rows(deployment, batch, row) if row and not restore else []
            with render.progress_display() as events:
                done = withdrawal.withdraw(deployment, meant, events)
        finally:
            render.warn_of_withdrawn(deployment.storage)
    say(f"{done.sentence}.")
    if done.batches:
        say(f"`qaq refresh` also makes the calibrations again: {', '.join(done.batches)}.")
    if near:
        warn(f"Near duplicates of that row, no longer removed: {', '.join(near)}. Withdraw them too if necessary.")
    older = versions.kept_versions(deployment.storage)[:-1]
    if older and not restore:
        warn(
            f"Older versions may still contain it: {', '.join(older)}, in {versions.folder_url(deployment.storage)}. "
            "Remove their folders if they must not be kept; the delivery itself is in deliveries/."
        )


def publish(
    version: Annotated[str, typer.Argument(help="A published version: number, first digits of its hash, or `latest`.")],
    to: Annotated[str, typer.Option("--to", help="hf://datasets/ORG/NAME[@REVISION], a folder, or any fsspec URL.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is created, make it private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be written.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Copy a version to the Hugging Face hub in one commit, or to a folder; if it is already there, write nothing."""
    storage = open_stored(config_file)
    with expected(hub.PublishError):
        copy = hub.publish(storage, version, to, is_private=private, is_dry_run=dry_run)
    if dry_run:
        for name, size in copy.sizes.items():
            say(f"{size:>12,} {name}")
    done = "would be published to" if dry_run else "published to" if copy.is_new else "is already at"
    say(f"{copy.version} {done} {copy.url}: {len(copy.sizes):,} files, {sum(copy.sizes.values()):,} bytes")
    for name in copy.removed:
        say(f"removed file of an earlier version: {name}")
    for name in copy.replaced:
        warn(f"replaced a file that `qaq publish` had not written: {name}; the repository's history has it")


def cache(
    prune: Annotated[
        str | None,
        typer.Option("--prune", help="Remove the scores of this model: its name, or the first digits of its key."),
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Show the contents of the score cache by model, and how often they were used."""
    storage = open_stored(config_file)
    models = storage.scores.models()
    if prune is None:
        render.print_cache(models)
        return
    found = [one for one in models if one.identity["model"] == prune or _is_key(one.digest, prune)]
    if not found:
        fail(f"the cache holds nothing of {prune!r}; `qaq cache` lists what it holds")
    for one in found:
        storage.scores.prune(one.digest)
        say(f"removed {one.num_scores:,} scores of {one.identity['model']}")


def _is_key(digest: str, start: str) -> bool:
    return len(start) >= _SHORTEST_KEY and digest.startswith(start)
