"""The sections of the settings file as frozen, closed pydantic models, and `Settings`, the whole file.

Belongs here: every field that a user can set, with its description, unit and bounds. Does not belong here: the effect
of a field, the loader (`config.load`), and the fields of a selection (`config.selections`).
"""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from qaq_pipeline.config.base import NAME, ROLE_NAME, Closed, require_distinct, without_credentials
from qaq_pipeline.config.conditions import RECORD, ROW_COLUMNS, TOKEN_COLUMNS, tables_named
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
from qaq_pipeline.schema.vocabularies import Defect, Signal

SignalAction = Literal["drop", "flag", "off"]

_IDENTIFIER = r"^[A-Za-z_][A-Za-z0-9_]*$"

_RENDERED_BY_PIPELINE = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
    | {"conversation", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"}
)
"""Arguments of the rendering, which a template variable would replace."""


class FieldSettings(Closed):
    """The names of the fields of records that are no conversations. Of each list but `context`, the first name that a
    record has is read. Where query, context or answer are named, a file that has one of the names is read by them, and
    any other file as if they were not named.
    """

    query: tuple[str, ...] = Field(
        ("query", "question", "problem", "instruction", "prompt", "problem_statement", "input"), min_length=1
    )
    """Fields of the query."""
    context: tuple[str, ...] = ("input", "context")
    """Fields with more text of the query, such as a table or a schema: each that a record has follows the query on a
    line of its own."""
    answer: tuple[str, ...] = Field(
        ("response", "answer", "solution", "output", "completion", "generation"), min_length=1
    )
    """Fields of the answer."""
    reasoning: tuple[str, ...] = ("reasoning_content", "reasoning", "thinking")
    """Fields of the reasoning before the answer, also of a turn."""
    system: tuple[str, ...] = ("system", "system_prompt")
    """Fields of the row's own system text, also where the record is a conversation."""
    source: tuple[str, ...] = ("source",)
    """Fields of the name of the row's source."""
    language: tuple[str, ...] = ("language", "programming_language")
    """Fields of the programming language."""
    licence: tuple[str, ...] = ("license", "licence")
    """Fields of the licence."""


class RecordSettings(Closed):
    """The reading of delivered files."""

    shape: Literal["auto", "alpaca", "sharegpt", "messages", "preference", "prompt_completion", "query_answer"] = "auto"
    """Shape of the records; `auto` detects it for each file."""
    fields: FieldSettings = FieldSettings()
    """Names of fields."""
    multi_turn: Literal["last", "every"] = "last"
    """Pairs of a conversation: the last one that may be trained on, or every one."""
    context: Literal["none", "history"] = "none"
    """What else than its system text is context of a pair. history: the turns before its query, calls of tools and what
    tools said included, and the tools that the record offers. Context is read by the models and never scored."""
    reasoning: Literal["leave_out", "score"] = "leave_out"
    """Reasoning before an answer, in a field of its own or in `<think>` tags. leave_out: it is not part of the scored
    answer. score: it is the beginning of the answer."""


class DuplicateSettings(Closed):
    """The duplicates. Rows that differ only in Unicode form, line ends, or white space at the end of lines always are
    duplicates.
    """

    near_threshold: float | None = Field(0.7, ge=0.5, le=1)
    """Minimum Jaccard similarity of near duplicates, by the 5-word sequences of query and answer; null: only equal rows
    are duplicates."""
    across_batches: bool = True
    """Also find duplicates of rows in older batches: the older row is kept, and the newer one is not scored."""
    cluster_threshold: float = Field(0.5, ge=0.3, le=1)
    """Minimum Jaccard similarity of two rows of one near-duplicate cluster; rows with equal queries are in one cluster,
    too. Not above near_threshold."""

    @model_validator(mode="after")
    def _clusters_are_wider(self) -> Self:
        if self.near_threshold is not None and self.cluster_threshold > self.near_threshold:
            raise ValueError(
                f"cluster_threshold: {self.cluster_threshold:g} is above near_threshold {self.near_threshold:g}, so "
                "that a row and its near duplicate would not be in one cluster; lower it, or raise near_threshold"
            )
        return self


class BenchmarkSettings(Closed):
    """A benchmark to exclude from training: a file in the published format of HumanEval(+), MBPP(+), LiveCodeBench,
    BigCodeBench, APPS, DS-1000, SWE-bench or MultiPL-E, or any other whose fields are named.
    """

    name: str = Field(pattern=NAME)
    """Name of the benchmark, as shown in the evidence."""
    path: str
    """Local path or fsspec URL of the file: JSONL, JSON, CSV, Parquet or Arrow, perhaps compressed."""
    id: str | None = None
    """Field of the task's name; null: tasks are numbered. It counts only with `prompt`."""
    prompt: str | None = None
    """Field of the task's text; null: the format is known."""
    solution: str | None = None
    """Field of its reference solution; null: it has none. It counts only with `prompt`."""


class ContaminationSettings(Closed):
    """The detection of rows that contain benchmark tasks, and their treatment."""

    benchmarks: tuple[BenchmarkSettings, ...] = ()
    """Benchmarks to exclude."""
    action: Literal["drop", "flag"] = "drop"
    """drop: such a row is neither scored nor selected. flag: such a row is scored and can be selected; the evidence is
    stored."""
    ngram_words: int = Field(10, ge=3, le=50)
    """Length of the compared word sequences, in words."""
    min_ngram_share: float = Field(0.2, gt=0, le=1)
    """A row is contaminated if it contains at least this share of a task's word sequences."""
    min_solution_words: int = Field(10, ge=1)
    """A solution of at least this many words is also searched for as exact text."""
    trivial_solutions: tuple[str, ...] = ()
    """Solutions that are too common to search for; white space is ignored."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        require_distinct("benchmarks", [benchmark.name for benchmark in self.benchmarks])
        return self


PersonalData = Literal["email", "ip_address", "phone_number", "payment_card", "bank_account", "us_social_security"]
"""Kinds of personal data that have a form of their own."""


class ScreeningSettings(Closed):
    """The screening of rows before scoring."""

    duplicates: DuplicateSettings = DuplicateSettings()
    """Exact and near duplicates."""
    contamination: ContaminationSettings = ContaminationSettings()
    """Benchmark tasks."""
    secrets: Literal["drop", "off"] = "drop"
    """drop: a row whose record contains a key or token of a service, or a private key, is not published, and its text
    is not shown. off: nobody looks for them."""
    personal_data: tuple[PersonalData, ...] = ()
    """Kinds of personal data whose rows are not published, and their texts not shown: email, ip_address, phone_number,
    payment_card, bank_account (IBAN), us_social_security. Examples that documents reserve do not count."""
    licences: tuple[str, ...] | None = None
    """Licences that may be published, in any case of letters; null: any. A row that names none may be published."""


class HeldOutSettings(Closed):
    """The rows that are held out for training trials: whole near-duplicate clusters, drawn by a keyed hash. They are
    not scored, so that they set no rank and no cut. Rows keep their side: share and seed decide on new clusters only.
    """

    share: float = Field(0.0, ge=0, le=0.5)
    """Share of the new clusters that are held out; 0: none, and rows that were held out before are accepted again."""
    seed: int = Field(0, ge=0)
    """Seed of the draw."""


class GateSettings(Closed):
    """The conditions for scoring and publishing a batch. Its rows are in `decisions` in any case."""

    max_rejected_share: float | None = Field(0.2, ge=0, le=1)
    """Maximum share of rejected rows; null: no limit. Above it, nothing is scored."""
    min_scorable_share: float | None = Field(0.5, ge=0, le=1)
    """Minimum share of distinct pairs that each model must score; null: no limit."""
    must_tell: bool = False
    """Hold a batch back if RMI does not tell its pairs from the same queries with answers to other queries. If false,
    such a batch is published with a warning, and the signal `mismatch` declares none of its pairs invalid."""


class CheckSettings(Closed):
    """The limits of the asset checks. A check only reports; a gate stops a batch."""

    max_null_logprob_share: float = Field(0.05, ge=0, le=1)
    """Of the likelihoods that `scoring.quantities` needs, the maximum share that may be null under a model."""
    max_truncated_share: float = Field(0.1, ge=0, le=1)
    """Maximum share of answers that are truncated to fit into `scoring.max_tokens`."""
    min_mean_rmi: float = Field(0.0, ge=-10, le=10)
    """The mean RMI of a batch under a model must be above this, in nats/token."""
    max_rank_correlation: float = Field(0.98, ge=-1, le=1)
    """The Spearman correlation of the two models' ranks must be below this."""
    max_psi: float = Field(0.25, ge=0, le=100)
    """Maximum population stability index of PPL(Q) and RMI against the reference."""
    max_ks: float = Field(0.2, ge=0, le=1)
    """Maximum Kolmogorov-Smirnov statistic of PPL(Q) and RMI against the reference."""
    max_kept_share: float = Field(0.35, ge=0, le=1)
    """Maximum share of the planted rows of each defect that the published selection may keep."""
    min_auc: float = Field(0.8, ge=0.5, le=1)
    """Minimum AUROC with which a model's RMI must separate matched pairs from mismatched ones (the same query with
    another row's answer)."""


class LandingSettings(Closed):
    """The landing zone, and the rule for a complete delivery."""

    url: str | None = None
    """Local path or fsspec URL; each file or folder in it is one delivery. Default: QAQ_HOME/landing."""
    marker: str = Field("_SUCCESS", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """File that marks a delivery as complete: in its folder, or FILE.MARKER beside a file."""
    require_marker: bool = False
    """Wait for the marker. If false, a delivery is also complete when two polls find the same files."""
    interval_seconds: int = Field(30, ge=1)
    """Time between two polls, in seconds."""


class AutomationSettings(Closed):
    """The work that starts automatically while the daemon runs (`qaq ui` or `dagster-daemon`)."""

    started: bool = False
    """Start sensors and schedules with the daemon; the UI can start and stop each of them."""
    interval_seconds: int = Field(30, ge=1)
    """Time between two evaluations of the assets' conditions, in seconds."""
    refresh_cron: str = "0 3 * * *"
    """Cron schedule that rebuilds stale tables."""
    timezone: str = "UTC"
    """Time zone of the schedule, such as Europe/Berlin."""
    stale_after_hours: float = Field(192.0, gt=0)
    """If nothing was published for this many hours, the freshness policy of the dataset fails in the UI."""

    @model_validator(mode="after")
    def _zone(self) -> Self:
        if self.timezone not in zoneinfo.available_timezones():
            raise ValueError(f"timezone: {self.timezone!r} is not a time zone, such as UTC or Europe/Berlin")
        return self


class LockSettings(Closed):
    """Locks between processes that write the same storage or use the same Dagster instance."""

    kind: Literal["files", "postgres"] = "files"
    """`files`: in QAQ_HOME, between the processes of one machine. `postgres`: advisory locks of a database, between all
    machines that use it; needs the extra `postgres`."""
    url_from: str = Field("QAQ_POSTGRES_URL", pattern=_IDENTIFIER)
    """Environment variable with the URL of the database, such as postgresql://qaq@db.example/qaq. The password may be
    in it, or in PGPASSWORD. `files` ignores it."""


class StorageSettings(Closed):
    """The place of tables, deliveries and the score cache."""

    root: str | None = None
    """Local path or fsspec URL (s3://…, gs://…). Default: QAQ_HOME/storage."""
    locks: LockSettings = LockSettings()
    """Locks of what is written."""


class ModelSettings(Closed):
    """One scoring model, from exactly one of `hub`, `directory` and `gguf`."""

    hub: str | None = None
    """Hugging Face Hub id, such as Qwen/Qwen3-0.6B."""
    revision: str | None = None
    """Commit of the hub repository. Default: the newest, which is stored with the scores."""
    directory: str | None = None
    """Local directory in Hugging Face layout; relative to model_cache."""
    gguf: str | None = None
    """Local GGUF file, converted once to safetensors; relative to model_cache."""
    frame: Literal["chat", "plain"] = "chat"
    """`chat`: a chat template. `plain`: literal text, for models without one."""
    chat_template_from: str | None = None
    """Source of the chat template, such as the instruct model of the same family: hub id, local directory or .jinja
    file. Default: the model itself."""
    chat_template_name: str | None = None
    """Name of the chat template, if there are several. Default: the one named `default`. `frame: plain` ignores it."""
    template_variables: dict[Annotated[str, Field(pattern=_IDENTIFIER)], bool | int | float | str] = Field({})
    """Variables of the chat template, such as `{enable_thinking: false}`. `frame: plain` ignores them."""
    system_prompt: str = "You are a helpful coding assistant."
    """System prompt of every pass; a row's own system text replaces it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "mixed"] = "auto"
    """Type of the weights and of the products with them. `mixed`: bfloat16, but float32 for the sum of the layers, the
    norms and the logits. `auto`: mixed on a GPU and bfloat16 on a CPU if they have hardware support for bfloat16,
    otherwise float32."""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """Device: auto, cpu, mps, cuda or cuda:N. On a Ray cluster the number has no meaning."""
    gpus: float | None = Field(None, ge=0, le=1)
    """GPUs that each of its workers reserves on a cluster. In a pool on Ray 0.5 lets two share one; elsewhere it is
    rounded up. Default: 1 if `device` names a GPU, or is `auto` and the pool on Ray has one, otherwise 0."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self.require_one_of("hub", "directory", "gguf")
        if self.gpus == 0 and self.device.startswith("cuda"):
            raise ValueError("gpus: 0 leaves no GPU for `device: cuda`; leave gpus out, or set `device: cpu`")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision is for a hub model only; a local model is identified by the hashes of its files")
        if self.chat_template_from is not None and self.frame != "chat":
            raise ValueError("chat_template_from needs frame: chat")
        if taken := sorted(_RENDERED_BY_PIPELINE.intersection(self.template_variables)):
            raise ValueError(f"template_variables: the pipeline itself sets {', '.join(taken)}")
        return self


class ScoringSettings(Closed):
    """The scores, their prompt and their window."""

    quantities: tuple[Literal["rmi", "ifd", "end"], ...] = Field(("rmi", "ifd", "end"), min_length=1)
    """Scores to compute. ifd costs about as much as rmi; end comes with the pass of rmi and costs nothing more."""
    prior: Literal["null_answer", "user", "bare"] = "null_answer"
    """Text before Q when log PPL(Q) is computed: the reverse prompt with an empty answer, the beginning of a user turn,
    or only the token that begins a sequence (BOS)."""
    invalid_clause: bool = True
    """Keep the authors' sentence in the reverse prompt that asks for "INVALID" if the question is not about
    programming."""
    max_tokens: int = Field(2048, ge=16, le=1_048_576)
    """Maximum length of one sequence (the window), in tokens."""
    too_long: Literal["truncate_answer", "leave_unscored"] = "truncate_answer"
    """For a pair over max_tokens: cut the end of A, or leave the pair unscored."""


class EligibilitySettings(Closed):
    """The conditions for a pair to be ranked and selected."""

    min_query_tokens: int = Field(1, ge=1)
    """Minimum number of tokens of Q. Pairs with fewer tokens are neither ranked nor selected."""
    short_query_tokens: int = Field(4, ge=0)
    """Pairs with fewer tokens of Q than this are flagged as short."""


class PoolSettings(Closed):
    """The processes that score pairs under a model."""

    kind: Literal["in_process", "processes", "ray"] = "processes"
    """`in_process`: the process of the step, on a GPU one process beside it. `processes`: processes of this machine.
    `ray`: workers of a Ray cluster. Their machines find the models and the storage at the same places."""
    size: int | None = Field(None, ge=1)
    """Maximum number of processes. Default: one per GPU, or one per CPU core with one thread each, if there is enough
    work."""
    address: str | None = None
    """Address of the Ray cluster. On a machine of the cluster: `auto` or HOST:PORT; elsewhere: ray://HOST:PORT.
    Default: auto."""

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if self.kind == "in_process" and self.size not in (None, 1):
            raise ValueError("kind: in_process has one process; leave size out, or set kind: processes")
        if self.kind != "ray" and self.address is not None:
            raise ValueError("address is that of a Ray cluster; set kind: ray, or leave it out")
        return self


class RuntimeSettings(Closed):
    """The execution of the work. These settings change time and memory, not results."""

    executor: Literal["in_process", "multiprocess", "k8s", "ray"] = "in_process"
    """Where the steps of a run run. `in_process`: in its process. `multiprocess`: each in a process of its own. `k8s`:
    each as a job of Kubernetes (dagster-k8s). `ray`: each as a job of Ray (dagster-ray)."""
    executor_config: dict[str, Any] = Field({})
    """Configuration of the executors `k8s` and `ray`, as dagster-k8s and dagster-ray document it."""
    submit_to: str | None = None
    """Address of a Dagster webserver, such as `http://dagster:3000`. `qaq run`, `qaq refresh`, `qaq withdraw`,
    `qaq trial` and the nightly job then submit each run there and wait for its end, so that it goes through the queue
    and the launcher of the deployment. Default: they execute it in their own process."""
    run_tags: dict[str, Any] = Field({})
    """Tags of every run, such as `dagster-k8s/config`."""
    op_tags: dict[str, dict[str, Any]] = Field({})
    """Tags of steps, by asset."""
    max_runtime_seconds: int | None = Field(None, gt=0)
    """Time after which Dagster's daemon ends a run (`run_monitoring`). Default: no limit."""

    batch_tokens: int | None = Field(None, ge=16)
    """Maximum number of tokens of one forward pass, padding included. It limits memory. Default: 1,024 on a CPU; on a
    GPU up to 32,768, depending on its free memory."""
    pool: PoolSettings = PoolSettings()
    """The processes that score."""
    patience_seconds: float = Field(1800.0, gt=0)
    """Maximum time that a scoring process may be silent, while it loads its model or scores a batch, in seconds. After
    it the process is ended and replaced."""
    shard_seconds: float = Field(20.0, ge=0)
    """Time between two writes of finished scores, in seconds."""
    lock_timeout_seconds: float = Field(10.0, ge=0)
    """Maximum wait for another step that writes the same partition, in seconds."""
    max_retries: int = Field(3, ge=0)
    """How often a step is retried if a server does not answer: an object store or a database. Other errors are not
    retried."""
    retry_seconds: float = Field(20.0, ge=0)
    """Wait before such a retry, in seconds."""

    @model_validator(mode="after")
    def _has_cluster(self) -> Self:
        if self.executor_config and self.executor not in ("k8s", "ray"):
            raise ValueError("executor_config is for the executors k8s and ray")
        if self.submit_to is not None:
            address = urlsplit(self.submit_to)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise ValueError("submit_to is the address of a webserver, such as http://dagster:3000")
        return self


class ReferenceSettings(Closed):
    """A reference: the scored pairs of a fixed set of batches. Ranks and cuts can be computed against it."""

    name: str = Field(pattern=NAME)
    """Name of the reference. Its content is fixed: other batches need another name."""
    batches: tuple[Annotated[str, AfterValidator(check_batch_name)], ...] = Field(min_length=1)
    """Batches that provide the pairs; a pair that is in several batches counts once, with its scores from the first of
    them."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        require_distinct("batches", self.batches)
        return self


class RankingSettings(Closed):
    """The strata of PPL(Q) and the ranks within them."""

    num_strata: int = Field(10, ge=1, le=1000)
    """Number of strata of PPL(Q), each with the same number of pairs."""
    min_rows_per_stratum: int = Field(20, ge=1)
    """Minimum rows in a stratum. Too few rows give fewer strata and a warning."""
    strata_from: Literal["own", "strong"] = "own"
    """PPL(Q) that defines the strata: each model's own, or the strong model's for all."""
    pool: Literal["batch", "reference"] = "batch"
    """The ranking pool, the pairs with which a pair is compared: the batch itself or the reference."""
    reference: ReferenceSettings | None = None
    """The reference for the ranks of `pool: reference`; with `pool: batch`, for drift only."""

    def without_pool(self) -> dict[str, Any]:
        """Return the settings of strata and ranks without the pool, as JSON."""
        return self.model_dump(mode="json", exclude={"pool", "reference"})

    @model_validator(mode="after")
    def _has_pool(self) -> Self:
        if self.pool == "reference" and self.reference is None:
            raise ValueError("pool: reference needs `reference: {name: NAME, batches: [BATCH, …]}`")
        return self


class TableSettings(Closed):
    """An imported table, such as test results or scores of a judge: a Parquet, CSV or JSONL file, optionally gzipped,
    with one row for each pair.
    """

    name: str = Field(pattern=NAME)
    """Name of the table; a selection names its columns as NAME.COLUMN."""
    path: str
    """Local path or fsspec URL of the file."""
    key: Literal["pair_id", "row"]
    """Column that names the pair: `pair_id`, or `row`, the place of a row as `batch/file:row.turn`."""

    @model_validator(mode="after")
    def _is_free(self) -> Self:
        if self.name == RECORD:
            raise ValueError(f"name: {RECORD!r} is the prefix of the delivered record's fields; take another name")
        return self


class CalibrationSettings(Closed):
    """A validation of the scores by planted defects: copies of pairs are made bad on purpose, and scored with them."""

    enabled: bool = True
    """Plant defects in every batch, and validate its scores after it is published."""
    defects: tuple[Defect, ...] = Field(tuple(Defect), min_length=1)
    """Defects to plant."""
    mismatches: int = Field(200, ge=1, le=1000)
    """Number of planted rows with the answer to another query (other_answer): the null distribution of mismatches. A
    batch of fewer pairs gets at most one row per pair."""
    rows_per_defect: int = Field(60, ge=1, le=1000)
    """Number of planted rows of every other defect. A batch of fewer pairs gets at most one row per pair."""
    seed: int = Field(0, ge=0)
    """Seed that decides which rows are copied and how the copies are changed."""

    @model_validator(mode="after")
    def _defects(self) -> Self:
        require_distinct("defects", self.defects)
        return self


class ValiditySettings(Closed):
    """The signals of pairs that should not be trained on. drop: a selection with `valid: true` takes no pair that the
    signal declares invalid. flag: its evidence is stored and shown. off: it is not looked at.
    """

    mismatch: SignalAction = "drop"
    """RMI is not clearly above that of answers to other queries."""
    echo: SignalAction = "drop"
    """The answer repeats the query and little else."""
    unfinished: SignalAction = "drop"
    """The models do not expect the answer to end where it ends. Needs `end` in `scoring.quantities`."""
    implausible_query: SignalAction = "drop"
    """PPL(Q) is as high as that of queries with invented words."""
    unclosed: SignalAction = "flag"
    """The answer leaves a bracket or a code fence open."""
    max_false_share: float = Field(0.015, gt=0, lt=1)
    """For each signal, the largest share of pairs with its defect among those that it keeps, as estimated on the batch.
    A smaller share also drops more good pairs."""

    def is_on(self, signal: Signal) -> bool:
        """Whether the signal is looked at."""
        return getattr(self, signal.value) != "off"

    def declares(self, signal: Signal) -> bool:
        """Whether the signal declares pairs invalid."""
        return getattr(self, signal.value) == "drop"


EVERYTHING, UNTRAINED = TRIAL_ARMS = ("everything", "untrained")
"""Arms of a training trial that are no selection."""
SCORES_FOLDER = "scores"
"""Folder of a version, beside those that have the names of selections."""
HELD_OUT = "held_out"
"""The measure of a training trial on held-out pairs."""


class TrialSettings(Closed):
    """A training trial of a published version: a model is fine-tuned on its selection, on random controls and on all
    rows, by the same amount of training, and measured on held-out pairs.
    """

    model: str = Field("weak", pattern=ROLE_NAME)
    """Role of the model that is fine-tuned."""
    selections: tuple[Annotated[str, Field(pattern=NAME)], ...] = ()
    """Further selections to train on, besides the published one and its controls."""
    seeds: int = Field(5, ge=1, le=100)
    """Number of trainings of each arm. A seed decides the order of the rows, and the draw of random arms. A verdict
    needs at least 5."""
    equal: Literal["tokens", "rows"] = "tokens"
    """Amount of training that is equal in all arms: answer tokens, or rows."""
    amount: int | None = Field(None, ge=1)
    """Answer tokens, or rows, of a training. Default: those of the published selection's random control, once. An arm
    with fewer repeats its rows."""
    rows_per_step: int = Field(8, ge=1)
    """Mean number of rows of an optimizer step in the random control."""
    method: Literal["full", "lora"] = "full"
    """Train all weights, or adapters of low rank by peft; `lora` needs the extra `trial`."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the first step; it falls linearly to 0. Default: 5e-5 for full, 2e-4 for lora."""
    curve_points: int = Field(4, ge=1)
    """Number of points of a learning curve."""
    max_held_out: int = Field(400, ge=1)
    """Maximum number of held-out pairs that are measured, one of each near-duplicate cluster; a keyed hash chooses
    them."""
    benchmarks: tuple[BenchmarkSettings, ...] = ()
    """Files in the format of HumanEval or MBPP, whose canonical solutions are measured after their prompts. Their tasks
    are not excluded from training: list them in screening.contamination too."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        require_distinct("selections", self.selections)
        require_distinct("benchmarks", [benchmark.name for benchmark in self.benchmarks])
        return self

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or {"full": 5e-5, "lora": 2e-4}[self.method]


class ExportSettings(Closed):
    """The training files of a published version."""

    rows: Literal["pair", "conversation"] = "pair"
    """pair: the query and the answer that were scored, after their context. conversation: each delivered record as it
    came, tools and reasoning included, in `conversations.jsonl` instead of `formats`; needs `records.multi_turn: last`
    and `records.context: history`."""
    formats: tuple[Literal["messages", "prompt_completion", "alpaca", "sharegpt", "parquet", "hf"], ...] = Field(
        ("messages", "prompt_completion", "alpaca"), min_length=1
    )
    """messages, prompt_completion, sharegpt: JSONL. alpaca: JSON. parquet: messages as Parquet. hf: messages as a
    folder of `save_to_disk`; needs the extra `datasets`."""
    selections: Literal["published", "all"] | tuple[Annotated[str, Field(pattern=NAME)], ...] = "published"
    """published: the published selection and its controls. all, or names: other selections as well."""
    reasoning: Literal["inline", "leave_out"] = "inline"
    """inline: reasoning that was not scored is written before its answer, in `<think>` tags. leave_out: it is not."""
    meta: bool = False
    """Add `meta` to records: the origin of the row, and the delivered record as JSON text."""

    @property
    def written(self) -> tuple[str, ...]:
        """The formats that are written."""
        return ("conversation",) if self.rows == "conversation" else self.formats


class PublicationSettings(Closed):
    """The retention of published versions."""

    keep_versions: int | None = Field(None, ge=1)
    """Number of newest versions whose files are kept; null: all. Manifests and differences always stay. `qaq explain`
    cannot tell what a version decided about a row if its files were removed."""


class LogAlerts(Closed):
    """The Python logger `qaq_pipeline.alerts`: ERROR for a failed run, WARNING for the rest."""

    kind: Literal["log"] = "log"


class EmailAlerts(Closed):
    """A message over SMTP."""

    kind: Literal["email"]
    host: str = Field(min_length=1)
    """SMTP server."""
    port: int = Field(587, ge=1, le=65535)
    """Port of the SMTP server."""
    sender: str = Field(pattern=r"^[^@\s]+@[^@\s]+$")
    """Sender address of the messages."""
    recipients: tuple[Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")], ...] = Field(min_length=1)
    """Recipient addresses."""
    starttls: bool = True
    """Encrypt the connection with STARTTLS and check the certificate."""
    username: str | None = Field(None, min_length=1)
    """Login name; null: no login."""
    password_env: str | None = Field(None, pattern=_IDENTIFIER)
    """Environment variable that contains the password."""

    @model_validator(mode="after")
    def _login(self) -> Self:
        if (self.username is None) != (self.password_env is None):
            raise ValueError("username and password_env belong together: give both or neither")
        if self.username is not None and not self.starttls:
            raise ValueError("password_env needs starttls: true; the password would be sent in clear text")
        return self


class SlackAlerts(Closed):
    """A Slack incoming webhook; needs the extra `slack`."""

    kind: Literal["slack"]
    webhook_env: str = Field("SLACK_WEBHOOK_URL", pattern=_IDENTIFIER)
    """Environment variable that contains the webhook's URL, which is a secret."""


class PythonAlerts(Closed):
    """A Python function of the user, called with the Alert."""

    kind: Literal["python"]
    target: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$")
    """Function, as module:function; imported when the first alert is sent."""


ROWS_PORT = 3001
"""Port on which `qaq rows` and `qaq ui` serve the rows by default."""


class ReportSettings(Closed):
    """The audit pages and the plots in the UI."""

    pages: bool = True
    """Write a page for every batch and every published version."""
    plots: bool = True
    """Show plots of the assets in the UI, each under 100 KB."""
    rows_url: str = f"http://127.0.0.1:{ROWS_PORT}"
    """Where `qaq rows` or `qaq ui` serves the rows: pages and the UI link to it."""
    examples: int = Field(10, ge=0, le=25)
    """Maximum number of example rows on a page for each reason, for the lowest and the highest ranks and gaps, and on
    either side of the cut of each signal."""

    def rows_of_batch(self, batch: str) -> str:
        """Address of the rows of a batch."""
        return f"{self.rows_url.rstrip('/')}/batches/{batch}"

    def rows_of_version(self, version: str) -> str:
        """Address of the published rows of a version, by its hash."""
        return f"{self.rows_url.rstrip('/')}/versions/{version}?decision=selected&order=line"


class AlertSettings(Closed):
    """The channels for alerts about failed runs, gated batches and refused deliveries."""

    channels: tuple[
        Annotated[LogAlerts | EmailAlerts | SlackAlerts | PythonAlerts, Field(discriminator="kind")], ...
    ] = (LogAlerts(),)
    """Each alert goes to every channel; empty: no alerts."""


class Settings(Closed):
    """The whole settings file."""

    records: RecordSettings = RecordSettings()
    """Reading of delivered files."""
    screening: ScreeningSettings = ScreeningSettings()
    """Screening of rows before scoring."""
    held_out: HeldOutSettings = HeldOutSettings()
    """Rows held out for training trials."""
    gates: GateSettings = GateSettings()
    """Conditions for scoring and publishing a batch."""
    checks: CheckSettings = CheckSettings()
    """Limits of the asset checks."""
    landing: LandingSettings = LandingSettings()
    """Landing zone of deliveries."""
    automation: AutomationSettings = AutomationSettings()
    """Automatic runs."""
    storage: StorageSettings = StorageSettings()
    """Place of all stored data."""
    model_cache: str | None = None
    """Folder of local and converted models. Default: QAQ_HOME/models."""
    models: dict[Annotated[str, Field(pattern=ROLE_NAME)], ModelSettings]
    """Scoring models by role; `strong` and `weak` are required."""
    scoring: ScoringSettings = ScoringSettings()
    """Scores, prompt and window."""
    eligibility: EligibilitySettings = EligibilitySettings()
    """Conditions for ranking a pair."""
    ranking: RankingSettings = RankingSettings()
    """Strata and ranks."""
    tables: tuple[TableSettings, ...] = ()
    """Imported tables, whose columns the selections can name."""
    validity: ValiditySettings = ValiditySettings()
    """Signals of invalid pairs."""
    selections: tuple[Selection, ...] = Field(
        (DiffSelection(name="qaq", strategy="diff_high", valid=True),), min_length=1
    )
    """Named selections. The first is published, with random controls of the same size."""
    calibration: CalibrationSettings = CalibrationSettings()
    """Validation of the scores by planted defects."""
    trial: TrialSettings = TrialSettings()
    """Training trial of a published version."""
    export: ExportSettings = ExportSettings()
    """Formats of the published dataset."""
    publication: PublicationSettings = PublicationSettings()
    """Retention of older versions."""
    reports: ReportSettings = ReportSettings()
    """Audit pages and plots."""
    alerts: AlertSettings = AlertSettings()
    """Alerts about problems."""
    runtime: RuntimeSettings = RuntimeSettings()
    """Execution of the work."""

    _home: Path = PrivateAttr(default=Path("var"))

    def model_post_init(self, context: Any, /) -> None:
        """Take QAQ_HOME from the key `home` of the context, if present."""
        self._home = (context or {}).get("home", self._home)

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        """Settings are stored with every table, and published in manifests."""
        if found := [place for place, text in _texts(self.model_dump()) if without_credentials(text) != text]:
            raise ValueError(
                f"{', '.join(found)}: a URL contains a password, a token or a signature; settings are stored and "
                "published with the dataset: give credentials in the environment, as the store documents it"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        missing = [role for role in ("strong", "weak") if role not in self.models]
        if missing:
            raise ValueError(f"models: the roles {missing} are missing; `strong` and `weak` are required")
        if self.runtime.pool.kind == "ray" and any(model.device == "mps" for model in self.models.values()):
            raise ValueError("models: `device: mps` is of this machine, not of a Ray cluster; set cpu or cuda")
        names = [selection.name for selection in self.selections]
        require_distinct("selections", names)
        if SCORES_FOLDER in names:
            raise ValueError(f"selections: a version has a folder {SCORES_FOLDER!r} of its own; choose another name")
        require_distinct("tables", [table.name for table in self.tables])
        for selection in self.selections:
            self._check_selection(selection)
        for name in () if isinstance(self.export.selections, str) else self.export.selections:
            if name not in names:
                raise ValueError(f"export.selections: {name!r} is not a selection; known: {names}")
        self._check_trial()
        self._check_export()
        if self.held_out.share and not self.screening.duplicates.across_batches:
            raise ValueError(
                "held_out: rows are held out with all rows of their cluster, also those of other batches: set "
                "screening.duplicates.across_batches: true, or held_out.share: 0"
            )
        if self.ranking.pool == "reference" and "rmi" not in self.scoring.quantities:
            raise ValueError("ranking: pool: reference needs `rmi` in scoring.quantities: it ranks RMI")
        return self

    def _check_trial(self) -> None:
        names = [selection.name for selection in self.selections]
        for name in names:
            if name in TRIAL_ARMS:
                raise ValueError(
                    f"selections: the name {name!r} is reserved for an arm of `qaq trial`; take another one"
                )
        for benchmark in self.trial.benchmarks:
            if benchmark.name == HELD_OUT:
                raise ValueError(f"trial.benchmarks: {HELD_OUT!r} is the name of the held-out pairs; take another one")
        if self.trial.model not in self.models:
            raise ValueError(f"trial.model: {self.trial.model!r} is not a model; known: {sorted(self.models)}")
        for name in self.trial.selections:
            if name not in names:
                raise ValueError(f"trial.selections: {name!r} is not a selection; known: {names}")

    def _check_export(self) -> None:
        """Reject files that would hold what was not looked at, or could not hold what was."""
        read, export = self.records, self.export
        if export.rows == "conversation":
            if read.multi_turn != "last" or read.context != "history":
                raise ValueError(
                    "export.rows: conversation publishes each record whole, so one pair of it stands for all of it, in "
                    "the context of its earlier turns: set records.multi_turn: last and records.context: history"
                )
            if export.meta:
                raise ValueError(
                    "export.meta: `export.rows: conversation` adds nothing to the delivered records; leave meta out, "
                    "keys.parquet leads from each line to its row"
                )
        elif read.context == "history" and "alpaca" in export.formats:
            raise ValueError(
                "export.formats: alpaca has no place for earlier turns (records.context: history); set "
                "export.formats: [messages, prompt_completion], or others without alpaca"
            )

    def _check_selection(self, selection: Selection) -> None:
        if selection.name.startswith(CONTROL_PREFIX):
            raise ValueError(f"selections: {selection.name!r}: the prefix {CONTROL_PREFIX!r} is reserved for controls")
        role = getattr(selection, "model", "strong")
        if role not in self.models:
            raise ValueError(f"selections: {selection.name!r} uses the model {role!r}; known: {sorted(self.models)}")
        if selection.valid and not self.is_calibrated:
            raise ValueError(
                f"selections: {selection.name!r} takes valid pairs only (valid: true), and the cuts of validity come "
                "from planted rows: set calibration.enabled: true and have `rmi` in scoring.quantities, or leave "
                "`valid` out"
            )
        self._check_conditions(selection)
        match selection:
            case LengthSelection():
                return
            case IfdSelection() | PplSelection(measure="log_ppl_a" | "log_ppl_a_given_q"):
                needed = "ifd"
            case _:
                needed = "rmi"
        if needed not in self.scoring.quantities:
            raise ValueError(f"selections: {selection.name!r} needs `{needed}` in scoring.quantities")

    def _check_conditions(self, selection: Selection) -> None:
        """Reject a column of no table, and quotas in a reference: each batch takes another number of its pairs."""
        tables = {table.name for table in self.tables}
        for column in selection.columns:
            table, dot, _ = column.partition(".")
            if table not in {*tables, RECORD} if dot else column not in (*ROW_COLUMNS, *TOKEN_COLUMNS):
                of_tables = (f"{name}.COLUMN" for name in sorted(tables))
                known = [*ROW_COLUMNS, *TOKEN_COLUMNS, f"{RECORD}.FIELD", *of_tables]
                raise ValueError(
                    f"selections: {selection.name!r} names the column {column!r}; known: {', '.join(known)}. "
                    "The section `tables` imports others"
                )
        if selection.quotas is not None and self.ranking.pool == "reference":
            raise ValueError(
                f"selections: {selection.name!r} has quotas, which divide the budget of one batch; with ranking.pool: "
                "reference, a budget is of the reference. Leave quotas out, or rank each batch by itself"
            )

    @model_validator(mode="after")
    def _places(self) -> Self:
        """Reject a landing zone that overlaps the storage, because the pipeline would ingest its own files."""
        zone, stored = (f"{url.rstrip('/')}/" for url in (self.landing_url, self.storage_root))
        if zone.startswith(stored) or stored.startswith(zone):
            raise ValueError(
                f"landing.url: {self.landing_url!r} and storage.root {self.storage_root!r} overlap; take two folders"
            )
        return self

    @property
    def is_calibrated(self) -> bool:
        """True if batches are calibrated: it is enabled, and RMI is computed."""
        return self.calibration.enabled and "rmi" in self.scoring.quantities

    @property
    def tables_read(self) -> list[TableSettings]:
        """The imported tables that a selection names."""
        named = tables_named(self.selections)
        return [table for table in self.tables if table.name in named]

    @property
    def published(self) -> Selection:
        """The selection that selected_subset and curated_dataset publish."""
        return self.selections[0]

    @property
    def exported(self) -> list[str]:
        """Names of the exported selections: the published one, its controls, then any others."""
        published, *others = (selection.name for selection in self.selections)
        controls = [CONTROL_PREFIX + strategy for strategy in CONTROL_STRATEGIES]
        wanted = self.export.selections
        if wanted != "all":
            others = [name for name in others if wanted != "published" and name in wanted]
        return [published, *controls, *others]

    @property
    def home(self) -> Path:
        """QAQ_HOME as an absolute path."""
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


def _texts(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in settings, with its place."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _texts(inside, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inside in enumerate(value):
            yield from _texts(inside, f"{place}.{number}")
    elif isinstance(value, str):
        yield place, value
