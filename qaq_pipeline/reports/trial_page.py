"""Present a training trial: verdict, tables, plots, an HTML page, and a note for the dataset's card.

Belongs here: the layout of the numbers. Does not belong here: the trainings and the statistics (`trial`), drawing
(`plots`), rendering (`pages`) and storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import HELD_OUT, UNTRAINED
from qaq_pipeline.publication.versions import TRIAL_HEADING
from qaq_pipeline.reports import pages, plots
from qaq_pipeline.reports.pages import Made, Table
from qaq_pipeline.reports.plots import Plot
from qaq_pipeline.trial import verdict
from qaq_pipeline.trial.arms import CONTROLS
from qaq_pipeline.trial.verdict import Comparison

_SMALLEST_P_VALUE = 0.001

LIMITS = (
    "The number of seeds and the learning rate must be chosen before the trial. Whoever tries several until the "
    "verdict suits has no verdict.",
    "The interval covers other orders of the rows and other draws of the controls, not other held-out pairs.",
    "A lower loss on answers of this kind is no proof of better programs: nothing is executed.",
    "Held-out pairs are as delivered, bad ones included. No signal chose them, so that they favour no arm.",
    "All arms get the same amount of training. With more training, or a larger model, the arms can rank differently.",
    "A random control takes rows under the conditions of the selection: with `valid: true` it takes valid rows. "
    "`everything` has no condition.",
)


@dataclass(frozen=True)
class Shown:
    """A trial to show."""

    version: str
    published: str
    frame: pl.DataFrame
    """TrainingTrial."""
    runs: Sequence[Mapping[str, Any]]
    """Arm, seed, rows, tokens, steps, seconds and curve of each training."""
    facts: Mapping[str, Any]
    """`selection`, `model`, `amount`, `measured` of the provenance."""

    @property
    def measures(self) -> list[str]:
        """Held-out pairs first, then the benchmarks."""
        return [HELD_OUT, *(name for name in self.facts["measured"] if name != HELD_OUT)]

    @property
    def arms(self) -> list[str]:
        """In the order of the trainings."""
        return list(dict.fromkeys(run["arm"] for run in self.runs))

    @cached_property
    def primary(self) -> Comparison:
        """The published selection against its random control on held-out pairs."""
        return self._compare(HELD_OUT, self.published)

    @cached_property
    def others(self) -> list[Comparison]:
        """Every other arm and measure against the random control, with p-values adjusted for their number.

        The untrained model is compared too, but without an adjustment, which would make the others' p-values larger.
        """
        pairs = [
            (measure, arm) for measure in self.measures for arm in self.arms if arm not in (CONTROLS[0], UNTRAINED)
        ]
        found = verdict.holm([self._compare(*one) for one in pairs if one != (HELD_OUT, self.published)])
        return [*found, *(self._compare(measure, UNTRAINED) for measure in self.measures)]

    def _compare(self, measure: str, arm: str) -> Comparison:
        return verdict.compare(self.frame, measure, arm, CONTROLS[0])

    @property
    def verdict(self) -> str:
        """The answer to the question of the trial."""
        return verdict.sentence(self.primary)

    @property
    def sentences(self) -> list[str]:
        """The verdict, then the other comparisons."""
        return [self.verdict, *map(verdict.sentence, self.others)]


def of_stored(version: str, frame: pl.DataFrame, provenance: Mapping[str, Any]) -> Shown:
    """The trial of a version from its stored table and provenance."""
    return Shown(version, provenance["selection"], frame, provenance["runs"], provenance)


def tables(shown: Shown) -> list[Table]:
    """The losses of each arm, the differences from the random control, and the cost."""
    return [_losses(shown), _differences(shown), _cost(shown)]


def _losses(shown: Shown) -> Table:
    means = verdict.arm_means(shown.frame).group_by("measure", "arm").agg(pl.col("loss").mean(), seeds=pl.len())
    found = {(measure, arm): (loss, seeds) for measure, arm, loss, seeds in means.iter_rows()}
    rows = [
        (arm, f"{found[HELD_OUT, arm][1]}", *(f"{found[measure, arm][0]:.4f}" for measure in shown.measures))
        for arm in shown.arms
    ]
    return Table("Mean loss after training, nats per answer token", ("trained on", "seeds", *shown.measures), rows)


def _differences(shown: Shown) -> Table:
    rows = [
        (
            one.arm,
            one.measure,
            f"{one.difference:+.4f}",
            "-" if one.lower is None else f"{one.lower:+.4f} to {one.upper:+.4f}",
            _p_value(one.p_value),
            one.verdict.value.replace("_", " "),
        )
        for one in [shown.primary, *shown.others]
    ]
    head = ("trained on", "measure", "difference", "95 % interval", "p", "verdict")
    return Table(
        f"Loss less that of {CONTROLS[0]}; the first row decides; the p-values of the other trained arms are Holm's",
        head,
        rows,
    )


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= _SMALLEST_P_VALUE else f"<{_SMALLEST_P_VALUE}"


def _cost(shown: Shown) -> Table:
    rows = []
    for arm in shown.arms:
        own = [run for run in shown.runs if run["arm"] == arm]
        means = [
            sum(run[name] for run in own) / len(own) for name in ("num_rows", "num_tokens", "num_steps", "seconds")
        ]
        rows.append((arm, f"{len(own)}", *(f"{mean:,.0f}" for mean in means)))
    head = ("trained on", "trainings", "distinct rows", "answer tokens", "steps", "seconds")
    return Table("Trainings of each arm, means", head, rows)


def as_markdown(shown: Shown) -> str:
    """The tables as Markdown, for the UI."""
    return "\n\n".join(_markdown(table) for table in tables(shown)) + "\n"


def _markdown(table: Table) -> str:
    head = [f"| {' | '.join(table.head)} |", "|" + "---|" * len(table.head)]
    return "\n".join([f"**{table.caption}**", "", *head, *(f"| {' | '.join(map(str, row))} |" for row in table.rows)])


def note(shown: Shown) -> bytes:
    """The section of the dataset's card."""
    model, amount = shown.facts["model"], shown.facts["amount"]
    text = (
        f"{TRIAL_HEADING}\n\n{shown.verdict}\n\n"
        f"{model['model']} ({model['revision']}) was trained ({model['method']}, learning rate "
        f"{model['learning_rate']:g}) on {amount['amount']:,} {amount['unit']} in {amount['steps']:,} steps, the same "
        f"in every arm, on a {model['device']} in {model['precision']}.\n\n{_markdown(_losses(shown))}\n\n"
        + "\n".join(f"- {limit}" for limit in LIMITS)
        + "\n"
    )
    return text.encode()


# --- plots and page -------------------------------------------------------------------------------------------------


def differences(shown: Shown) -> Plot:
    """The differences from the random control. The untrained model is left out: it would hide the rest."""
    rows = [
        (one.measure, one.arm, one.difference, one.lower, one.upper)
        for one in [shown.primary, *shown.others]
        if one.arm != UNTRAINED
    ]
    schema = {"group": pl.String, "arm": pl.String, "value": pl.Float64, "lower": pl.Float64, "upper": pl.Float64}
    return plots.differences(pl.DataFrame(rows, schema=schema, orient="row"), CONTROLS[0])


def learning_curves(shown: Shown) -> Plot:
    """Each arm's held-out loss at each step that was measured, in the training of the first seed."""
    rows = [
        (run["arm"], point["step"], point["held_out_loss"])
        for run in shown.runs
        for point in run["curve"]
        if "held_out_loss" in point
    ]
    points = pl.DataFrame(rows, schema={"group": pl.String, "step": pl.Int64, "loss": pl.Float64}, orient="row")
    return plots.learning_curves(points)


def page(shown: Shown, made: Made) -> bytes:
    """Render the page of a trial."""
    losses, compared, cost = tables(shown)
    return pages.render(
        "trial.html",
        {
            "title": f"Training trial of version {shown.version}",
            "version": shown.version,
            "verdict": shown.verdict,
            "outcome": shown.primary.verdict.value,
            "published": shown.published,
            "control": CONTROLS[0],
            "model": shown.facts["model"],
            "amount": shown.facts["amount"],
            "losses": losses,
            "compared": compared,
            "sentences": [verdict.sentence(one) for one in shown.others],
            "cost": cost,
            "plots": [differences(shown), learning_curves(shown)],
            "limits": LIMITS,
            "made": made,
        },
    )
