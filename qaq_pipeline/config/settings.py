"""The sections of the settings file as frozen, closed pydantic models, and `Settings`, the whole file.

Belongs here: every field that a user can set, with its description, unit and bounds. Does not belong here: what a field
does, the reading of the file (`config.load`), and the fields of a selection (`config.selections`).
"""

from __future__ import annotations

import zoneinfo
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from qaq_pipeline.config.base import NAME, ROLE_NAME, Closed
from qaq_pipeline.config.selections import (
    CONTROL_PREFIX,
    CONTROL_STRATEGIES,
    DiffSelection,
    IfdSelection,
    LengthSelection,
    PplSelection,
    Selection,
)
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.schema.vocabularies import Defect


class RecordSettings(Closed):
    """How delivered files are read."""

    shape: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "query_answer"] = Field(
        "auto", description="Shape of the records; `auto` detects it for each file."
    )
    multi_turn: Literal["last", "every"] = Field(
        "last",
        description="Of a conversation, take the last user turn and the assistant turn after it, or every such pair.",
    )


class DuplicateSettings(Closed):
    """Which rows another row stands for. Equal ones (white space and Unicode form aside) always are."""

    near_threshold: float | None = Field(
        0.7,
        ge=0.5,
        le=1,
        description="Least Jaccard similarity of the 5-word sequences of query and answer of near duplicates; null: "
        "only equal rows are duplicates.",
    )
    across_batches: bool = Field(True, description="Whether a row of an older batch may stand for one of a newer.")


class BenchmarkSettings(Closed):
    """A benchmark whose tasks must not be trained on: a file as HumanEval, MBPP or LiveCodeBench are published."""

    name: str = Field(pattern=NAME, description="Name of the benchmark, as in the evidence.")
    path: str = Field(description="Local path or any fsspec URL of the file: JSONL or JSON, perhaps gzipped.")


class ContaminationSettings(Closed):
    """Which rows hold benchmark tasks, and what becomes of them."""

    benchmarks: tuple[BenchmarkSettings, ...] = Field((), description="Benchmarks to keep out.")
    action: Literal["drop", "flag"] = Field(
        "drop", description="drop: such a row is not scored and never selected. flag: it is, with the evidence beside."
    )
    ngram_words: int = Field(10, ge=3, le=50, description="Length of the compared word sequences, in words.")
    min_share: float = Field(
        0.2, gt=0, le=1, description="Least share of a task's word sequences that a row must hold."
    )
    min_solution_words: int = Field(
        10, ge=1, description="Shorter solutions are not looked for word for word, in words."
    )
    trivial_solutions: tuple[str, ...] = Field(
        (), description="Solutions that are nobody's own, and not looked for, white space aside."
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"benchmarks: the name {name!r} is used twice")
        return self


class ScreeningSettings(Closed):
    """What is found out about rows before any of them is scored."""

    duplicates: DuplicateSettings = Field(DuplicateSettings(), description="Equal and near rows.")
    contamination: ContaminationSettings = Field(ContaminationSettings(), description="Benchmark tasks.")


class GateSettings(Closed):
    """What a batch must be like to be scored and published; its rows are in `decisions` in any case."""

    max_rejected_share: float | None = Field(
        0.2, ge=0, le=1, description="Share of rows that may be rejected; null: any. Above it, nothing is scored."
    )
    min_scorable_share: float | None = Field(
        0.5, ge=0, le=1, description="Least share of the distinct pairs that every model must score; null: any."
    )


class CheckSettings(Closed):
    """When an asset check does not pass. Checks report; what stops a batch is a gate."""

    max_null_share: float = Field(
        0.05, ge=0, le=1, description="Share of wanted quantities that a model may leave without a number."
    )
    max_truncated_share: float = Field(0.1, ge=0, le=1, description="Share of answers that may be cut to the window.")
    min_mean_rmi: float = Field(
        0.0, ge=-10, le=10, description="Mean RMI of a batch under a model must be above this, in nats/token."
    )
    max_rank_correlation: float = Field(
        0.98, ge=-1, le=1, description="Spearman's correlation of the two models' ranks must be below this."
    )
    max_psi: float = Field(
        0.25, ge=0, le=100, description="Population stability index of PPL(Q) and RMI against the reference, at most."
    )
    max_ks: float = Field(
        0.2, ge=0, le=1, description="Kolmogorov-Smirnov statistic of PPL(Q) and RMI against the reference, at most."
    )


class LandingSettings(Closed):
    """Where deliveries land, and when one is complete."""

    url: str | None = Field(
        None,
        description="Local path or any fsspec URL; a file or folder in it is one delivery. Default: QAQ_HOME/landing.",
    )
    marker: str = Field(
        "_SUCCESS",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="File that says that a delivery is complete: in its folder, or FILE.MARKER beside a file.",
    )
    require_marker: bool = Field(
        False,
        description="Whether only the marker says so; else a delivery whose files stay the same for two looks is.",
    )
    interval_seconds: int = Field(30, ge=1, description="How often is looked, in seconds.")


class AutomationSettings(Closed):
    """What runs without a hand while the daemon runs: `qaq ui`, or `dagster-daemon`."""

    started: bool = Field(
        False, description="Whether sensors and schedules run from the start; the UI starts and stops each of them."
    )
    interval_seconds: int = Field(30, ge=1, description="How often the assets' conditions are evaluated, in seconds.")
    refresh_cron: str = Field("0 3 * * *", description="When stale tables are rebuilt, as cron.")
    timezone: str = Field("UTC", description="Time zone of the cron, such as Europe/Berlin.")
    stale_after_hours: float = Field(
        192.0, gt=0, description="The dataset is stale when nothing was published for longer, in hours."
    )

    @model_validator(mode="after")
    def _zone(self) -> Self:
        if self.timezone not in zoneinfo.available_timezones():
            raise ValueError(f"timezone: {self.timezone!r} is no time zone; such as UTC or Europe/Berlin")
        return self


class StorageSettings(Closed):
    """Where tables, deliveries and the score cache lie."""

    root: str | None = Field(
        None, description="Local path or any fsspec URL (s3://…, gs://…). Default: QAQ_HOME/storage."
    )


class ModelSettings(Closed):
    """One scoring model. Exactly one of `hub`, `directory` and `gguf` says where it comes from."""

    hub: str | None = Field(None, description="Hugging Face hub id, such as Qwen/Qwen3-0.6B.")
    revision: str | None = Field(
        None, description="Commit of the hub repository; without it the newest is taken, and stored with the scores."
    )
    directory: str | None = Field(None, description="Local directory in Hugging Face layout; relative to model_cache.")
    gguf: str | None = Field(
        None, description="Local GGUF file, converted once to safetensors; relative to model_cache."
    )
    frame: Literal["chat", "plain"] = Field(
        "chat", description="`chat`: a chat template. `plain`: literal text, for models without one."
    )
    chat_template_from: str | None = Field(
        None,
        description="Hub id, local directory, or .jinja file whose chat template is borrowed: the instruct sibling of "
        "the same family. Default: the model's own.",
    )
    system_prompt: str = Field(
        "You are a helpful coding assistant.",
        description="The system prompt of every pass; a row's own system text replaces it.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the weights. `auto`: bfloat16 where natively fast, else float32."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in ("hub", "directory", "gguf") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(f"give exactly one of hub, directory, gguf; got {sources or 'none'}")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision belongs to a hub model only; a local one is identified by its files' hashes")
        if self.chat_template_from is not None and self.frame != "chat":
            raise ValueError("chat_template_from needs frame: chat")
        return self


class ScoringSettings(Closed):
    """What is scored, in which prompt, within which window."""

    quantities: tuple[Literal["rmi", "ifd"], ...] = Field(
        ("rmi", "ifd"), min_length=1, description="Scores wanted; ifd costs about as much again as rmi."
    )
    prior: Literal["null_answer", "user", "bare"] = Field(
        "null_answer",
        description="Context of log PPL(Q): the reverse prompt with an empty answer, Q as a user turn, or BOS alone.",
    )
    invalid_clause: bool = Field(
        True, description='Whether the reverse prompt asks for "INVALID" outside programming, as the authors do.'
    )
    max_tokens: int = Field(2048, ge=16, le=1_048_576, description="Window of one sequence, in tokens.")
    too_long: Literal["truncate_answer", "leave_unscored"] = Field(
        "truncate_answer", description="A pair over max_tokens: A loses its tail, or the pair is left unscored."
    )


class EligibilitySettings(Closed):
    """Which scored pairs take part in ranks and selections."""

    min_query_tokens: int = Field(1, ge=1, description="Pairs whose Q has fewer tokens do not, in tokens.")
    short_query_tokens: int = Field(4, ge=0, description="Pairs whose Q has fewer tokens are flagged, in tokens.")


class RuntimeSettings(Closed):
    """How the work is run: changes time and memory, and no result."""

    executor: Literal["in_process", "multiprocess"] = Field(
        "in_process", description="Where steps run: in the run's process, or each in one of its own."
    )
    batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens of one forward pass, padding included: bounds memory. Default: 1,024 on a CPU; on a GPU "
        "up to 32,768, by its free memory.",
    )
    processes: int | None = Field(
        None,
        ge=1,
        description="Scoring processes at most. Default: one for each GPU, or for each core of a CPU with one thread "
        "each, where there is work enough.",
    )
    shard_seconds: float = Field(20.0, ge=0, description="How often finished scores are stored, in seconds.")
    lock_timeout_seconds: float = Field(
        10.0, ge=0, description="How long a step waits for another that writes the same partition, in seconds."
    )


class ReferenceSettings(Closed):
    """A frozen pool: the scored pairs of some batches, which ranks and cuts of every batch can be taken against."""

    name: str = Field(pattern=NAME, description="Name of the reference. It is frozen: other batches need another name.")
    batches: tuple[str, ...] = Field(
        min_length=1,
        description="Batches whose pairs it holds; a pair of several counts once, as in the first of them.",
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        for batch in self.batches:
            check_batch_name(batch)
            if self.batches.count(batch) > 1:
                raise ValueError(f"batches: {batch!r} is named twice")
        return self


class RankingSettings(Closed):
    """Strata of PPL(Q) and ranks inside them."""

    num_strata: int = Field(10, ge=1, le=1000, description="Equal-count strata of PPL(Q).")
    min_rows_per_stratum: int = Field(
        20, ge=1, description="Fewer strata are made, with a warning, when one would hold fewer rows."
    )
    strata_from: Literal["own", "strong"] = Field(
        "own", description="Whose PPL(Q) makes the strata: each model's own, or the strong model's for all."
    )
    pool: Literal["batch", "reference"] = Field(
        "batch", description="The pool in which ranks are taken: the batch itself, or the reference."
    )
    reference: ReferenceSettings | None = Field(
        None, description="What `pool: reference` ranks against; with `pool: batch`, what drift is measured against."
    )

    def without_pool(self) -> dict[str, Any]:
        """How strata and ranks are made, whatever the pool; as JSON."""
        return self.model_dump(mode="json", exclude={"pool", "reference"})

    @model_validator(mode="after")
    def _has_pool(self) -> Self:
        if self.pool == "reference" and self.reference is None:
            raise ValueError("pool: reference needs `reference: {name: NAME, batches: [BATCH, …]}`")
        return self


class CalibrationSettings(Closed):
    """A validation of the scores by planted defects: some rows of a batch are made bad on purpose, and scored too."""

    enabled: bool = Field(True, description="Whether the scores of a batch are validated, after it was published.")
    defects: tuple[Defect, ...] = Field(
        tuple(Defect),
        min_length=1,
        description="What is done to rows, the most telling first: of a small batch, only the first get rows.",
    )
    rows_per_defect: int = Field(100, ge=1, le=1000, description="Planted rows of each defect, at most.")
    max_share: float | None = Field(
        0.08, gt=0, le=1, description="Planted rows as a share of the batch's scorable pairs, at most; null: any."
    )
    seed: int = Field(0, ge=0, description="Key of the draw of rows, and of what is done to them.")
    false_discovery_rate: float = Field(
        0.05, gt=0, lt=1, description="Share of mismatches among what the low cut of RMI keeps that is aimed at."
    )
    echo_quantile: float = Field(
        0.05, ge=0, lt=1, description="Share of the echoes that may lie below the high cut of RMI."
    )
    min_auc: float = Field(
        0.8,
        ge=0.5,
        le=1,
        description="A model's RMI must tell rows from those with another answer with an AUROC of this at least.",
    )

    @model_validator(mode="after")
    def _defects(self) -> Self:
        for defect in self.defects:
            if self.defects.count(defect) > 1:
                raise ValueError(f"defects: {defect.value!r} is named twice")
        return self


class ExportSettings(Closed):
    """What is written for training beside the tables."""

    formats: tuple[Literal["messages", "prompt_completion", "alpaca", "sharegpt", "parquet", "hf"], ...] = Field(
        ("messages", "prompt_completion", "alpaca"),
        min_length=1,
        description="messages, prompt_completion, sharegpt: JSONL. alpaca: JSON. parquet: messages as Parquet. hf: "
        "messages as a folder of `save_to_disk`, with the extra `datasets`.",
    )
    selections: Literal["published", "all"] | tuple[Annotated[str, Field(pattern=NAME)], ...] = Field(
        "published",
        description="published: the published selection and its controls. all, or names: these other ones as well.",
    )
    meta: bool = Field(
        False,
        description="Whether records have `meta`: where the row comes from, and the delivered record, as JSON text.",
    )


class PublicationSettings(Closed):
    """What becomes of published versions."""

    keep_versions: int | None = Field(
        None,
        ge=1,
        description="Versions whose files are kept, the newest ones; null: all. Manifests and differences always are.",
    )


_ENVIRONMENT_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"


class LogAlerts(Closed):
    """The Python logger `qaq_pipeline.alerts`: ERROR for a failed run, WARNING for the rest."""

    kind: Literal["log"] = "log"


class EmailAlerts(Closed):
    """A message over SMTP."""

    kind: Literal["email"]
    host: str = Field(min_length=1, description="SMTP server.")
    port: int = Field(587, ge=1, le=65535, description="Its port.")
    sender: str = Field(pattern=r"^[^@\s]+@[^@\s]+$", description="Address that the messages are from.")
    recipients: tuple[Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")], ...] = Field(
        min_length=1, description="Addresses that they go to."
    )
    starttls: bool = Field(True, description="Whether the connection is encrypted by STARTTLS, certificate checked.")
    username: str | None = Field(None, min_length=1, description="Login name; null: no login.")
    password_env: str | None = Field(
        None, pattern=_ENVIRONMENT_NAME, description="Environment variable that holds the password."
    )

    @model_validator(mode="after")
    def _login(self) -> Self:
        if (self.username is None) != (self.password_env is None):
            raise ValueError("username and password_env belong together: give both or neither")
        if self.username is not None and not self.starttls:
            raise ValueError("password_env needs starttls: true; the password would be sent in clear text")
        return self


class SlackAlerts(Closed):
    """An incoming webhook of Slack; needs the extra `slack`."""

    kind: Literal["slack"]
    webhook_env: str = Field(
        "SLACK_WEBHOOK_URL",
        pattern=_ENVIRONMENT_NAME,
        description="Environment variable that holds the webhook's URL, which is a secret.",
    )


class PythonAlerts(Closed):
    """A function of the user's own, called with the Alert."""

    kind: Literal["python"]
    target: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        description="As module:function; imported when the first alert is sent.",
    )


class ReportSettings(Closed):
    """The audit pages, and the plots in the UI."""

    pages: bool = Field(True, description="Whether every batch and every published version gets a page.")
    pictures: bool = Field(True, description="Whether assets show plots in the UI, of under 100 KB each.")
    examples: int = Field(
        10, ge=0, le=25, description="Rows of each reason and of each tail that a page shows, at most."
    )


class AlertSettings(Closed):
    """Who is told of failed runs, gated batches and refused deliveries."""

    channels: tuple[
        Annotated[LogAlerts | EmailAlerts | SlackAlerts | PythonAlerts, Field(discriminator="kind")], ...
    ] = Field((LogAlerts(),), description="Every one of them is tried; none: nobody is told.")


class Settings(Closed):
    """The whole file."""

    records: RecordSettings = Field(RecordSettings(), description="How delivered files are read.")
    screening: ScreeningSettings = Field(ScreeningSettings(), description="What is found before scoring.")
    gates: GateSettings = Field(GateSettings(), description="What a batch must be like.")
    checks: CheckSettings = Field(CheckSettings(), description="When an asset check warns.")
    landing: LandingSettings = Field(LandingSettings(), description="Where deliveries land.")
    automation: AutomationSettings = Field(AutomationSettings(), description="What runs without a hand.")
    storage: StorageSettings = Field(StorageSettings(), description="Where everything is stored.")
    model_cache: str | None = Field(None, description="Folder of local and converted models. Default: QAQ_HOME/models.")
    models: dict[Annotated[str, Field(pattern=ROLE_NAME)], ModelSettings] = Field(
        description="Scoring models by role; `strong` and `weak` are required."
    )
    scoring: ScoringSettings = Field(ScoringSettings(), description="What is scored, and how.")
    eligibility: EligibilitySettings = Field(EligibilitySettings(), description="Which pairs are ranked.")
    ranking: RankingSettings = Field(RankingSettings(), description="Strata and ranks.")
    selections: tuple[Selection, ...] = Field(
        (DiffSelection(name="diff_high", strategy="diff_high"),),
        min_length=1,
        description="Named selections; the first is published, and random controls of its size come with it.",
    )
    calibration: CalibrationSettings = Field(
        CalibrationSettings(), description="Validation of the scores by planted defects."
    )
    export: ExportSettings = Field(ExportSettings(), description="Formats of the published dataset.")
    publication: PublicationSettings = Field(PublicationSettings(), description="What becomes of older versions.")
    reports: ReportSettings = Field(ReportSettings(), description="Audit pages and plots.")
    alerts: AlertSettings = Field(AlertSettings(), description="Who is told when something goes wrong.")
    runtime: RuntimeSettings = Field(RuntimeSettings(), description="How the work is run.")

    _home: Path = PrivateAttr(default=Path("var"))

    def model_post_init(self, context: Any, /) -> None:
        """Take QAQ_HOME from the key `home` of the context, where there is one."""
        self._home = (context or {}).get("home", self._home)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        missing = [role for role in ("strong", "weak") if role not in self.models]
        if missing:
            raise ValueError(f"models: the roles {missing} are missing; `strong` and `weak` are required")
        names = [selection.name for selection in self.selections]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"selections: the name {name!r} is used twice")
            if name.startswith(CONTROL_PREFIX):
                raise ValueError(f"selections: {name!r}: names that begin with {CONTROL_PREFIX!r} are the controls'")
        for selection in self.selections:
            self._check_selection(selection)
        for name in () if isinstance(self.export.selections, str) else self.export.selections:
            if name not in names:
                raise ValueError(f"export.selections: {name!r} is no selection; known: {names}")
        if self.ranking.pool == "reference" and "rmi" not in self.scoring.quantities:
            raise ValueError("ranking: pool: reference needs `rmi` in scoring.quantities: ranks are of RMI")
        return self

    def _check_selection(self, selection: Selection) -> None:
        role = getattr(selection, "model", "strong")
        if role not in self.models:
            raise ValueError(f"selections: {selection.name!r} uses the model {role!r}; known: {sorted(self.models)}")
        answer_side = isinstance(selection, IfdSelection) or (
            isinstance(selection, PplSelection) and selection.measure in ("log_ppl_a", "log_ppl_a_given_q")
        )
        if answer_side and "ifd" not in self.scoring.quantities:
            raise ValueError(f"selections: {selection.name!r} needs `ifd` in scoring.quantities")
        query_side = not isinstance(selection, IfdSelection | LengthSelection | PplSelection) or (
            isinstance(selection, PplSelection) and not answer_side
        )
        if query_side and "rmi" not in self.scoring.quantities:
            raise ValueError(f"selections: {selection.name!r} needs `rmi` in scoring.quantities")

    @model_validator(mode="after")
    def _places(self) -> Self:
        """The landing zone lies neither in the storage nor around it: the pipeline would take its own files in."""
        zone, stored = (f"{url.rstrip('/')}/" for url in (self.landing_url, self.storage_root))
        if zone.startswith(stored) or stored.startswith(zone):
            raise ValueError(
                f"landing.url: {self.landing_url!r} and storage.root {self.storage_root!r} lie in one another; take "
                "two folders"
            )
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether batches are calibrated: it is wanted, and there is an RMI to judge."""
        return self.calibration.enabled and "rmi" in self.scoring.quantities

    @property
    def published(self) -> Selection:
        """The selection that selected_subset and curated_dataset publish."""
        return self.selections[0]

    @property
    def exported(self) -> list[str]:
        """Names of the selections that are exported: the published one, its controls, then any other."""
        published, *others = (selection.name for selection in self.selections)
        controls = [CONTROL_PREFIX + strategy for strategy in CONTROL_STRATEGIES]
        match self.export.selections:
            case "published":
                others = []
            case "all":
                pass
            case names:
                others = [name for name in others if name in names]
        return [published, *controls, *others]

    @property
    def home(self) -> Path:
        """QAQ_HOME, absolute."""
        return self._home

    @property
    def storage_root(self) -> str:
        """Local path or fsspec URL of the storage."""
        return self.storage.root or str(self._home / "storage")

    @property
    def landing_url(self) -> str:
        """Local path or fsspec URL of the landing zone."""
        return self.landing.url or str(self._home / "landing")

    @property
    def model_cache_dir(self) -> Path:
        """Folder of local and converted models."""
        return Path(self.model_cache) if self.model_cache else self._home / "models"
