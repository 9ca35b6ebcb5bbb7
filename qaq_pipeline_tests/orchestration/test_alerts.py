"""alerts: what the channels carry, to real servers on this machine; and which runs and gates alert, how often."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import trustme
import yaml
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope

from qaq_pipeline.automation.failed_runs import build_alert_sensor
from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import AlertSettings, Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.orchestration import alerts
from qaq_pipeline.orchestration.alerts import Alert, send
from qaq_pipeline.runs import registration
from qaq_pipeline.runs import run_batch as driver
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.schema.vocabularies import GateReason
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline_tests.support.sentences import Check

MODELS = {"strong": {"hub": "tiny/strong"}, "weak": {"hub": "tiny/weak"}}
ALERT = Alert("Batch b1 is gated (empty_batch)", "It has no row.", "batch_gated", batch="b1", run_id="r1")
SECRET = "correct-horse-battery"

HOOK: dict[str, Any] = {"kind": "python", "target": f"{__name__}:remember"}
received: list[Alert] = []


def remember(alert: Alert) -> None:
    """The hook of a user's own."""
    received.append(alert)


def fail_to_remember(alert: Alert) -> None:
    """A hook with a fault."""
    raise KeyError(alert.batch)


@pytest.fixture(autouse=True)
def nothing_received() -> None:
    received.clear()


def alert_settings(*channels: dict[str, Any]) -> AlertSettings:
    return settings_with(*channels).alerts


def settings_with(*channels: dict[str, Any]) -> Settings:
    return parse_settings(yaml.safe_dump({"models": MODELS, "alerts": {"channels": list(channels)}}), "mine.yaml")


def refusal(*channels: dict[str, Any]) -> str:
    with pytest.raises(SettingsError) as caught:
        settings_with(*channels)
    return str(caught.value)


# --- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "level"), [("run_failed", "ERROR"), ("batch_gated", "WARNING"), ("delivery_refused", "WARNING")]
)
def test_without_settings_an_alert_is_a_line_of_the_log(
    kind: Any, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = parse_settings(yaml.safe_dump({"models": MODELS}))
    assert send(Alert("Something", "It is so.", kind), settings.alerts) == ()
    assert caplog.record_tuples == [("qaq_pipeline.alerts", getattr(logging, level), "Something. It is so.")]


def test_without_a_channel_nobody_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert send(ALERT, alert_settings()) == ()
    assert caplog.records == []


# --- e-mail -----------------------------------------------------------------------------------------------------------


class Mailbox:
    """Keeps what the server accepts, and the logins that it was shown; refuses one address."""

    def __init__(self) -> None:
        self.messages: list[tuple[list[str], EmailMessage]] = []
        self.logins: list[tuple[str, str]] = []

    async def handle_RCPT(self, server: Any, session: Any, envelope: Envelope, address: str, options: Any) -> str:  # noqa: N802
        if address == "gone@example.org":
            return "550 no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        message = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.messages.append((list(envelope.rcpt_tos), message))
        return "250 OK"

    def authenticate(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=data.password == SECRET.encode(), handled=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def mail_server(**options: Any) -> Iterator[tuple[Mailbox, int]]:
    mailbox, port = Mailbox(), free_port()
    if options.get("auth_required"):
        options["authenticator"] = mailbox.authenticate
    controller = Controller(mailbox, hostname="127.0.0.1", port=port, **options)
    controller.start()
    try:
        yield mailbox, port
    finally:
        controller.stop()


def email_channel(port: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "email",
        "host": "localhost",
        "port": port,
        "sender": "qaq@example.org",
        "recipients": ["ann@example.org", "bob@example.org"],
        "starttls": False,
    } | changes


def test_an_email_reaches_every_recipient() -> None:
    with mail_server() as (mailbox, port):
        assert send(ALERT, alert_settings(email_channel(port))) == ()
    ((recipients, message),) = mailbox.messages
    assert recipients == ["ann@example.org", "bob@example.org"]
    assert (message["Subject"], message["From"]) == (ALERT.subject, "qaq@example.org")
    assert message["To"] == "ann@example.org, bob@example.org"
    assert message.get_content().splitlines() == ["It has no row."]


def test_a_subject_cannot_add_a_header_and_any_text_is_carried() -> None:
    alert = Alert("one\nBcc: eve@example.org", "Größe: 日本\n.\nQUIT", "run_failed")
    with mail_server() as (mailbox, port):
        assert send(alert, alert_settings(email_channel(port))) == ()
    ((recipients, message),) = mailbox.messages
    assert message["Subject"] == "one Bcc: eve@example.org"
    assert message["Bcc"] is None
    assert "eve@example.org" not in recipients
    assert message.get_content().splitlines() == ["Größe: 日本", ".", "QUIT"]


def test_a_recipient_that_is_refused_is_named_and_the_others_get_it(check_sentence: Check) -> None:
    channel = email_channel(0, recipients=["ann@example.org", "gone@example.org"])
    with mail_server() as (mailbox, port):
        (failure,) = send(ALERT, alert_settings(channel | {"port": port}))
    check_sentence(failure)
    assert [recipients for recipients, _ in mailbox.messages] == [["ann@example.org"]]


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server's TLS context for localhost, whose authority this process trusts."""
    import ssl

    authority = trustme.CA()
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


def login_channel(port: int) -> dict[str, Any]:
    return email_channel(port, starttls=True, username="qaq", password_env="QAQ_MAIL_PASSWORD")


def test_a_login_goes_encrypted_with_the_password_of_the_environment(
    certificate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAQ_MAIL_PASSWORD", SECRET)
    with mail_server(tls_context=certificate, require_starttls=True, auth_required=True) as (mailbox, port):
        assert send(ALERT, alert_settings(login_channel(port))) == ()
    assert mailbox.logins == [("qaq", SECRET)]
    assert len(mailbox.messages) == 1


def test_a_server_whose_certificate_nobody_vouches_for_is_shown_no_password(
    certificate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAQ_MAIL_PASSWORD", SECRET)
    monkeypatch.delenv("SSL_CERT_FILE")
    with mail_server(tls_context=certificate, require_starttls=True, auth_required=True) as (mailbox, port):
        (failure,) = send(ALERT, alert_settings(login_channel(port)))
    assert "SSLCertVerificationError" in failure
    assert mailbox.logins == []


def test_a_wrong_password_is_not_in_the_error(certificate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_MAIL_PASSWORD", "wrong-" + SECRET)
    with mail_server(tls_context=certificate, require_starttls=True, auth_required=True) as (mailbox, port):
        (failure,) = send(ALERT, alert_settings(login_channel(port)))
    assert "SMTPAuthenticationError" in failure
    assert SECRET not in failure
    assert mailbox.messages == []


# --- Slack ------------------------------------------------------------------------------------------------------------


@contextmanager
def webhook(status: int = 200, body: bytes | None = b"ok") -> Iterator[tuple[list[Any], str]]:
    """A server that answers as Slack's incoming webhooks do, or without a body as one that echoes what it was asked;
    what it was sent, and its URL.
    """
    posted: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = f"no {self.path} here".encode() if body is None else body
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield posted, f"http://127.0.0.1:{server.server_port}/services/{SECRET}"
        finally:
            server.shutdown()
            thread.join()


SLACK: dict[str, Any] = {"kind": "slack"}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_slack_is_sent_subject_and_text_without_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    with webhook() as (posted, url):
        monkeypatch.setenv("SLACK_WEBHOOK_URL", url)
        assert send(Alert("a & b", "<!channel> it failed", "run_failed"), alert_settings(SLACK)) == ()
    assert posted == [{"text": "*a &amp; b*\n&lt;!channel&gt; it failed"}]


def test_the_variable_of_the_webhook_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with webhook() as (posted, url):
        monkeypatch.setenv("OUR_HOOK", url)
        assert send(ALERT, alert_settings(SLACK | {"webhook_env": "OUR_HOOK"})) == ()
    assert len(posted) == 1


def test_what_slack_answers_is_said(monkeypatch: pytest.MonkeyPatch, check_sentence: Check) -> None:
    with webhook(403, b"invalid_token") as (_, url):
        monkeypatch.setenv("SLACK_WEBHOOK_URL", url)
        (failure,) = send(ALERT, alert_settings(SLACK))
    check_sentence(failure)


def test_an_answer_that_is_no_code_of_slacks_is_not_quoted_since_it_may_hold_the_url(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with webhook(404, None) as (_, url):
        monkeypatch.setenv("SLACK_WEBHOOK_URL", url)
        (failure,) = send(ALERT, alert_settings(SLACK))
    assert failure.endswith("Slack answered 404; check the URL in SLACK_WEBHOOK_URL")
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        f"http://127.0.0.1:1/services/{SECRET}",
        f"ftp://hooks.example.org/{SECRET}",
        f"http://127.0.0.1:1/services/{SECRET} \x00",
        f"http://127.0.0.1:{SECRET}/services",
    ],
)
def test_no_error_and_no_log_line_holds_the_webhooks_url(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if "\x00" in url:  # The environment cannot hold it: what a Secret's file may leave behind is a line break.
        url = url.replace("\x00", "\n")
    monkeypatch.setenv("SLACK_WEBHOOK_URL", url)
    caplog.set_level(logging.DEBUG)
    (failure,) = send(ALERT, alert_settings(SLACK))
    assert "check the URL in SLACK_WEBHOOK_URL" in failure or "and the URL in SLACK_WEBHOOK_URL" in failure
    assert SECRET not in failure + caplog.text


# --- a function of the user's own -------------------------------------------------------------------------------------


def test_a_function_of_the_users_own_is_called_with_the_alert() -> None:
    assert send(ALERT, alert_settings(HOOK)) == ()
    assert received == [ALERT]


UNUSABLE_TARGETS = {
    "no_such_module:notify": "'no_such_module:notify' cannot be imported (No module named 'no_such_module')",
    f"{__name__}:no_such_function": f"'{__name__}:no_such_function' cannot be imported",
    f"{__name__}:SECRET": f"'{__name__}:SECRET' is no function but str; name one that takes an Alert",
    f"{__name__}:fail_to_remember": "KeyError: 'b1'",
}


@pytest.mark.parametrize("target", list(UNUSABLE_TARGETS))
def test_a_function_that_cannot_be_used_is_named_and_no_error_of_its_own_gets_out(target: str) -> None:
    (failure,) = send(ALERT, alert_settings({"kind": "python", "target": target}))
    assert UNUSABLE_TARGETS[target] in failure


# --- several channels, and what fails ---------------------------------------------------------------------------------


def test_a_channel_that_fails_is_logged_and_the_others_are_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, check_sentence: Check
) -> None:
    monkeypatch.delenv("SLACK_WEBHOOK_URL", raising=False)
    dead = email_channel(free_port())
    first, second = send(ALERT, alert_settings(dead, SLACK, HOOK))
    assert received == [ALERT]
    assert first.startswith(
        "alerts.channels.0 (email) did not send 'Batch b1 is gated (empty_batch)': ConnectionRefused"
    )
    assert second.startswith("alerts.channels.1 (slack) did not send")
    check_sentence(second)
    assert [record.getMessage() for record in caplog.records] == [first, second]
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert alerts.TIMEOUT_SECONDS < alerts.DEADLINE_SECONDS == 10
    monkeypatch.setattr(alerts, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("SLACK_WEBHOOK_URL", f"http://127.0.0.1:{port}/")
        failures = send(ALERT, alert_settings(email_channel(port), SLACK))
    assert ["timed out" in failure for failure in failures] == [True, True]


@contextmanager
def dripping_server(words: bytes) -> Iterator[int]:
    """A server that repeats its words at every connection, never late and never done; its port."""
    ended = threading.Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            while not ended.wait(0.05):
                connection.sendall(words)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        ended.set()
        thread.join()


def wait_for_ever(alert: Alert) -> None:
    """A hook that does not come back."""
    threading.Event().wait(60)


def test_a_channel_that_never_ends_is_given_up_and_the_next_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "DEADLINE_SECONDS", 0.5)
    waiting = {"kind": "python", "target": f"{__name__}:wait_for_ever"}
    with dripping_server(b"220-wait\r\n") as smtp, dripping_server(b"HTTP/1.1 100 Continue\r\n\r\n") as http:
        monkeypatch.setenv("SLACK_WEBHOOK_URL", f"http://127.0.0.1:{http}/")
        started = time.monotonic()
        failures = send(ALERT, alert_settings(email_channel(smtp), SLACK, waiting, HOOK))
        assert time.monotonic() - started < 30  # The hook alone waits for a minute.
    assert [failure.rpartition(": ")[2] for failure in failures] == ["it gave no answer in 0.5 s"] * 3
    assert received == [ALERT]


# --- the settings -----------------------------------------------------------------------------------------------------

REFUSED = {
    "password": (
        email_channel(25, password=SECRET),
        "alerts.channels.0.email.password: there is no such setting; did you mean 'password_env'?",
    ),
    "webhook": (SLACK | {"webhook": SECRET}, "alerts.channels.0.slack.webhook: there is no such setting"),
    "webhook_env": (SLACK | {"webhook_env": f"https://{SECRET}"}, "alerts.channels.0.slack.webhook_env: String should"),
    "login": (email_channel(25, username="qaq"), "username and password_env belong together: give both or neither"),
    "clear_text": (
        email_channel(25, username="qaq", password_env="P"),
        "password_env needs starttls: true; the password would be sent in clear text",
    ),
    "recipients": (
        email_channel(25, recipients=[]),
        "alerts.channels.0.email.recipients: Tuple should have at least 1",
    ),
    "sender": (email_channel(25, sender="qaq"), "alerts.channels.0.email.sender: String should match"),
    "target": ({"kind": "python", "target": "module.function"}, "alerts.channels.0.python.target: String should match"),
    "kind": ({"kind": "pager"}, "alerts.channels.0: kind 'pager' is not known"),
}


@pytest.mark.parametrize("fault", list(REFUSED))
def test_a_setting_that_cannot_be_used_is_named_and_no_secret_is_shown(fault: str) -> None:
    channel, named = REFUSED[fault]
    text = refusal(channel)
    assert text.startswith("mine.yaml: 1 setting(s) cannot be used:")
    assert named in text
    assert SECRET not in text


def test_a_secret_in_the_wrong_place_is_not_in_the_error_that_caused_the_refusal() -> None:
    with pytest.raises(SettingsError) as caught:
        settings_with(SLACK | {"webhook": SECRET})
    assert SECRET not in str(caught.value.__cause__)


def test_the_settings_hold_names_of_variables_and_never_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_MAIL_PASSWORD", SECRET)
    monkeypatch.setenv("SLACK_WEBHOOK_URL", SECRET)
    settings = settings_with(login_channel(587), SLACK)
    assert SECRET not in repr(settings) + settings.model_dump_json()
    assert "QAQ_MAIL_PASSWORD" in repr(settings)


# --- failed runs ------------------------------------------------------------------------------------------------------


def failing_asset(instance: dg.DagsterInstance, error: Exception) -> dg.ExecuteInProcessResult:
    """A run of an asset that fails so, of batch b1 and the weak model."""
    partitions = dg.MultiPartitionsDefinition(
        {"batch": dg.StaticPartitionsDefinition(["b1"]), "model": dg.StaticPartitionsDefinition(["weak"])}
    )

    @dg.asset(partitions_def=partitions)
    def rmi_scores() -> None:
        raise error

    job = dg.Definitions([rmi_scores]).resolve_implicit_global_asset_job_def()  # Of runs that the UI starts.
    return job.execute_in_process(
        instance=instance,
        partition_key=dg.MultiPartitionKey({"batch": "b1", "model": "weak"}),
        asset_selection=[rmi_scores.key],
        raise_on_error=False,
    )


@pytest.mark.parametrize(
    "error", [dg.Failure("no model here; fix it", allow_retries=False), ValueError("no model here; fix it")]
)
def test_the_alert_of_a_failed_run_says_which_step_failed_on_what_and_why(
    instance: dg.DagsterInstance, error: Exception
) -> None:
    run = failing_asset(instance, error)
    context = dg.build_run_status_sensor_context(
        sensor_name="alert_of_failed_run",
        dagster_instance=instance,
        dagster_run=run.dagster_run,
        dagster_event=run.get_run_failure_event(),
    )
    build_alert_sensor(settings_with(HOOK))(context)
    words = "no model here; fix it" if isinstance(error, dg.Failure) else "ValueError: no model here; fix it"
    assert received == [
        Alert(
            subject="rmi_scores of b1|weak failed",
            text=f"rmi_scores of b1|weak failed: step rmi_scores: {words}\n"
            f"Run {run.run_id}; earlier results are kept. Fix the cause and run again.",
            kind="run_failed",
            batch="b1",
            run_id=run.run_id,
        )
    ]


def test_a_run_that_died_without_a_failed_step_says_what_is_known(instance: dg.DagsterInstance) -> None:
    @dg.op
    def refresh() -> None:
        """Never runs."""

    @dg.job
    def nightly() -> None:
        refresh()

    run = instance.create_run_for_job(nightly)
    event = instance.report_run_failed(run, "its process 4711 is gone")
    failed = instance.get_run_by_id(run.run_id)
    assert failed is not None
    context = dg.build_run_status_sensor_context("alert_of_failed_run", event, instance, failed)
    build_alert_sensor(settings_with(HOOK))(context)
    (alert,) = received
    assert (alert.subject, alert.batch) == ("nightly failed", None)
    assert alert.text.startswith("nightly failed: its process 4711 is gone\n")


def test_every_failed_run_of_the_instance_is_alerted_once(instance: dg.DagsterInstance) -> None:
    sensor = build_alert_sensor(settings_with(HOOK))
    cursor: str | None = None

    def tick() -> None:
        nonlocal cursor
        # Of a code location, which the runs of the driver do not belong to.
        context = dg.build_sensor_context(instance, cursor=cursor, repository_name="__repository__")
        cursor = sensor.evaluate_tick(context).cursor

    failing_asset(instance, ValueError("before the sensor was started"))
    tick()
    runs = [failing_asset(instance, ValueError(why)).run_id for why in ("one", "two")]
    for _ in range(4):
        tick()
    assert [alert.run_id for alert in received] == runs


def test_the_sensor_runs_from_the_start_and_a_dead_channel_does_not_fail_it(
    instance: dg.DagsterInstance, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_with(email_channel(free_port()))
    (sensor,) = [sensor for sensor in build_defs(settings).sensors or [] if sensor.name == "alert_of_failed_run"]
    assert isinstance(sensor, dg.SensorDefinition)
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    run = failing_asset(instance, ValueError("no"))
    context = dg.build_run_status_sensor_context(
        sensor_name=sensor.name,
        dagster_instance=instance,
        dagster_run=run.dagster_run,
        dagster_event=run.get_run_failure_event(),
    )
    sensor(context)
    assert "alerts.channels.0 (email) did not send" in caplog.text


# --- gated batches ----------------------------------------------------------------------------------------------------

SettingsFor = Callable[..., Settings]


def test_the_alert_of_a_gated_batch_says_why() -> None:
    gate = Gate(GateReason.EMPTY_BATCH, "it has no row; deliver it again with some")
    assert alerts.gated("b1", gate, "r1") == Alert(
        subject="Batch b1 is gated (empty_batch)",
        text="Batch b1 is left out of the published dataset: it has no row; deliver it again with some.",
        kind="batch_gated",
        batch="b1",
        run_id="r1",
    )


def run_batch(settings: Settings, instance: dg.DagsterInstance, delivered: Path) -> None:
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    driver.run_batch(Deployment(settings, instance), "b1")


def test_a_batch_gated_before_scoring_is_alerted_once_and_again_when_the_verdict_changes(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, check_sentence: Check
) -> None:
    strict = settings_for(gates={"max_rejected_share": 0.01}, alerts={"channels": [HOOK]})
    for _ in range(2):
        with pytest.raises(RunError) as error:
            run_batch(strict, instance, delivered)
        check_sentence(error.value)
    assert [(alert.kind, alert.batch) for alert in received] == [("batch_gated", "b1")]
    check_sentence(received[0].text)
    run_batch(settings_for(alerts={"channels": [HOOK]}), instance, delivered)
    assert len(received) == 1
    with pytest.raises(RunError) as error:
        run_batch(strict, instance, delivered)
    check_sentence(error.value)
    assert [alert.subject for alert in received] == ["Batch b1 is gated (too_many_rejected)"] * 2
    assert len({alert.run_id for alert in received}) == 2


def test_a_batch_gated_after_scoring_is_alerted_once(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, check_sentence: Check
) -> None:
    settings = settings_for(
        scoring={"quantities": ["rmi"]},
        eligibility={"min_query_tokens": 500},
        gates={"min_scorable_share": 0.5},
        alerts={"channels": [HOOK]},
    )
    for _ in range(2):
        with pytest.raises(RunError) as error:
            run_batch(settings, instance, delivered)
        check_sentence(error.value)
    assert [alert.subject for alert in received] == ["Batch b1 is gated (too_few_scorable)"]


def test_a_dead_channel_is_in_the_event_log_of_a_gated_batch_and_fails_nothing(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    channel = {"kind": "python", "target": f"{__name__}:fail_to_remember"}
    settings = settings_for(gates={"max_rejected_share": 0.01}, alerts={"channels": [channel]})
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    job = build_defs(settings).resolve_job_def("ingest_batch")
    result = job.execute_in_process(instance=instance, partition_key="b1")
    assert result.success
    logged = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.level == logging.ERROR]
    assert logged == ["alerts.channels.0 (python) did not send 'Batch b1 is gated (too_many_rejected)': KeyError: 'b1'"]
