"""trial_page: the tables, the plots, the note of the card, and a self-contained page."""

from __future__ import annotations

import html
import math
import random
import re
from typing import Any

import polars as pl
import pytest

from qaq_pipeline.reports import plots, trial_page
from qaq_pipeline.reports.pages import Made
from qaq_pipeline.reports.trial_page import Shown
from qaq_pipeline.schema import tables
from qaq_pipeline.trial import verdict
from qaq_pipeline_tests.reports.test_pages import Seen

SHIFTS = {"mine": -0.05, "control_random": 0.0, "control_stratified_random": 0.001, "everything": 0.02}


def trial(seeds: int = 5) -> Shown:
    choice, rows, runs = random.Random(0), [], []
    for measure, level in (("held_out", 1.0), ("humaneval", 2.0)):
        for item in range(12):
            base = choice.uniform(0.5, 1.5) * level
            rows.append((measure, "untrained", 0, f"{item}", 10, 10 * (base + 1)))
            for seed in range(seeds):
                noise = 0.004 * math.sin(7 * seed)
                rows += [
                    (measure, arm, seed, f"{item}", 10, 10 * (base + by + noise * by * 20))
                    for arm, by in SHIFTS.items()
                ]
    for seed in range(seeds):
        for place, arm in enumerate(SHIFTS):
            curve = [{"step": 5, "loss": 2.0}, {"step": 5, "held_out_loss": 1.5}, {"step": 10, "held_out_loss": 1.2}]
            run = {"arm": arm, "seed": seed, "num_rows": 40 + place, "num_tokens": 4000, "num_steps": 10}
            runs.append(run | {"seconds": 30.0 + seed, "curve": curve if seed == 0 else curve[:1]})
    untrained = {
        "arm": "untrained",
        "seed": 0,
        "num_rows": 0,
        "num_tokens": 0,
        "num_steps": 0,
        "seconds": 5.0,
        "curve": [],
    }
    facts: dict[str, Any] = {
        "selection": "mine",
        "model": {
            "model": "tiny",
            "revision": "files:abc",
            "method": "full",
            "learning_rate": 5e-5,
            "device": "cpu",
            "precision": "bfloat16",
        },
        "amount": {"unit": "tokens", "amount": 4000, "steps": 10},
        "measured": {"held_out": 12, "humaneval": 12},
    }
    frame = pl.DataFrame(rows, schema=tables.dtypes(tables.TrainingTrial), orient="row")
    return Shown("abcd", "mine", tables.enforce(tables.TrainingTrial, frame), [untrained, *runs], facts)


def test_the_tables_hold_the_numbers_of_the_comparisons() -> None:
    shown = trial()
    losses, compared, cost = trial_page.tables(shown)
    means = verdict.arm_means(shown.frame)
    of_mine = means.filter(arm="mine", measure="held_out")["loss"].mean()
    assert losses.rows[1] == ("mine", "5", f"{of_mine:.4f}", losses.rows[1][3])
    assert [row[0] for row in losses.rows] == ["untrained", *SHIFTS]
    assert losses.rows[0][1] == "1"
    first = verdict.compare(shown.frame, "held_out", "mine", "control_random")
    assert compared.rows[0][:3] == ("mine", "held_out", f"{first.difference:+.4f}")
    assert compared.rows[0][-1] == "better"
    assert len(compared.rows) == 2 * len(SHIFTS)
    assert cost.rows[1] == ("mine", "5", "40", "4,000", "10", "32")


def test_only_the_comparisons_that_do_not_decide_are_adjusted() -> None:
    shown = trial()
    assert shown.primary == verdict.compare(shown.frame, "held_out", "mine", "control_random")
    raw = {
        (one.measure, one.arm): verdict.compare(shown.frame, one.measure, one.arm, "control_random")
        for one in shown.others
    }
    assert all((one.p_value or 0) >= (raw[one.measure, one.arm].p_value or 0) for one in shown.others)
    assert ("held_out", "mine") not in raw


def test_the_plots_show_every_arm() -> None:
    shown = trial()
    drawn = trial_page.differences(shown)
    assert set(drawn.table["arm"]) == set(SHIFTS) - {"control_random"}
    assert set(drawn.table["group"]) == {"held_out", "humaneval"}
    curves = trial_page.learning_curves(shown)
    assert curves.table.filter(group="mine")["loss"].to_list() == pytest.approx([1.5, 1.2])
    for plot in (drawn, curves):
        assert plots.svg(plot).startswith("<svg")
        assert (
            re.search(r'<path d="M[^"]*" stroke="var\(--plot-one\)" stroke-width="2"', plots.svg(plot)) or plot is drawn
        )
        assert plots.png(plot)


def test_the_page_says_the_verdict_first_and_needs_nothing_else() -> None:
    shown = trial()
    page = trial_page.page(shown, Made("2026-11-25T00:00:00+00:00", "run", "1-abc"))
    text = html.unescape(page.decode())
    assert text.index(shown.verdict) < text.index('id="arms"')
    for limit in trial_page.LIMITS:
        assert limit in text
    seen = Seen(page)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in seen.tags}
    assert not [
        value
        for _, attributes in seen.tags
        for value in (attributes.get("src"), attributes.get("href") or "#")
        if value and value[0] != "#"
    ]
    assert set(seen.tables) >= {table.caption for table in trial_page.tables(shown)}


def test_a_trial_with_one_seed_has_a_page_without_intervals() -> None:
    shown = trial(seeds=1)
    page = trial_page.page(shown, Made("2026-11-25T00:00:00+00:00", "run", "1-abc")).decode()
    assert "a verdict needs 5 seeds" in page
    assert trial_page.tables(shown)[1].rows[0][3:] == ("-", "-", "too few seeds")


def test_the_note_names_the_model_the_amount_and_the_limits() -> None:
    shown = trial()
    note = trial_page.note(shown).decode()
    assert note.startswith(f"## Training trial\n\n{shown.verdict}\n")
    assert "tiny (files:abc) was trained (full, learning rate 5e-05) on 4,000 tokens in 10 steps" in note
    assert note.count("\n- ") == len(trial_page.LIMITS)
