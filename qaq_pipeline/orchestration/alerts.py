"""Alerts: messages about failures, and the channels that carry them. No Dagster.

Belongs here: one function per channel, and the words of an alert that no Dagster event causes. Does not belong here:
the decision that an alert is due, which its sender makes.

An alert never fails the work that it reports: a channel that fails, or takes too long, is logged and named to the
caller, and the next one is tried.
Secrets are read from the environment when an alert is sent, and appear in no text.
"""

from __future__ import annotations

import html
import logging
import os
import pkgutil
import re
import smtplib
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any, Literal

from qaq_pipeline.config.settings import AlertSettings, EmailAlerts, LogAlerts, PythonAlerts, SlackAlerts
from qaq_pipeline.screening.gates import Gate

LOGGER = "qaq_pipeline.alerts"
"""Name of the logger that the channel `log` writes to. Users configure it, so it does not follow a module's name."""

logger = logging.getLogger(LOGGER)

TIMEOUT_SECONDS = 8
"""Timeout of each answer of a server."""
DEADLINE_SECONDS = 10
"""Time that a channel gets in total."""

_SLACK_CODE = re.compile(r"[a-z_]{1,60}")
"""Slack's code for a message that it refuses, such as invalid_token."""

Channel = LogAlerts | EmailAlerts | SlackAlerts | PythonAlerts


class AlertError(RuntimeError):
    """A channel did not accept an alert. The text gives the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class Alert:
    """A message, and the batch and run that it is about."""

    subject: str
    text: str
    kind: Literal["run_failed", "batch_gated", "delivery_refused"]
    batch: str | None = None
    run_id: str | None = None
    """Id of the Dagster run that failed, or that found the cause."""


def gated(batch: str, gate: Gate, run_id: str) -> Alert:
    """The alert of a batch that goes no further."""
    return Alert(
        subject=f"Batch {batch} is gated ({gate.reason.value})",
        text=f"Batch {batch} is left out of the published dataset: {gate.sentence}.",
        kind="batch_gated",
        batch=batch,
        run_id=run_id,
    )


def send(alert: Alert, settings: AlertSettings, *logs: logging.Logger) -> tuple[str, ...]:
    """Send the alert over every channel.

    Returns:
        A sentence with the cause for each channel that failed; each is logged too, here and in `logs`.
    """
    failures = tuple(
        f"alerts.channels.{number} ({channel.kind}) did not send {alert.subject!r}: {reason}"
        for number, channel in enumerate(settings.channels)
        if (reason := _failure(channel, alert)) is not None
    )
    for log in (logger, *logs):
        for failure in failures:
            log.error(failure)
    return failures


def _failure(channel: Channel, alert: Alert) -> str | None:
    """The reason why the channel did not accept the alert; None: it did.

    The timeout of a socket counts for each answer: a server that sends slowly would never end, nor would a function
    that waits.
    """
    reasons: list[str | None] = []
    # A daemon thread that is left behind does not keep the process alive.
    thread = threading.Thread(target=lambda: reasons.append(_send_over(channel, alert)), daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    return reasons[0] if reasons else f"it gave no answer in {DEADLINE_SECONDS:g} s"


def _send_over(channel: Channel, alert: Alert) -> str | None:
    """Send the alert over a channel; the reason why that failed, or None."""
    try:
        match channel:
            case LogAlerts():
                level = logging.ERROR if alert.kind == "run_failed" else logging.WARNING
                logger.log(level, "%s. %s", alert.subject, alert.text)
            case EmailAlerts():
                _send_email(channel, alert)
            case SlackAlerts():
                _send_to_slack(channel, alert)
            case PythonAlerts():
                _resolve(channel.target)(alert)
    except AlertError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the next channel is tried, and the run goes on.
        return f"{type(error).__name__}: {error}"
    return None


def _secret(name: str) -> str:
    """The value of an environment variable. Raises `AlertError` where it is not set."""
    value = os.environ.get(name)
    if not value:
        raise AlertError(f"the environment variable {name} is not set; set it where Dagster's processes start")
    return value


# --- e-mail -----------------------------------------------------------------------------------------------------


def _send_email(channel: EmailAlerts, alert: Alert) -> None:
    message = EmailMessage()
    message["Subject"] = " ".join(alert.subject.split())  # A line break would begin another header.
    message["From"] = channel.sender
    message["To"] = ", ".join(channel.recipients)
    message.set_content(alert.text)
    password = _secret(channel.password_env) if channel.password_env else None
    with smtplib.SMTP(channel.host, channel.port, timeout=TIMEOUT_SECONDS) as server:
        if channel.starttls:
            server.starttls(context=ssl.create_default_context())
        if channel.username is not None and password is not None:
            server.login(channel.username, password)
        refused = server.send_message(message)
    if refused:
        raise AlertError(f"{channel.host} refused the recipients {', '.join(sorted(refused))}; check the addresses")


# --- Slack ------------------------------------------------------------------------------------------------------


def _send_to_slack(channel: SlackAlerts, alert: Alert) -> None:
    try:
        from slack_sdk.webhook import WebhookClient
    except ImportError as error:
        raise AlertError("slack_sdk is not installed; install qaq-pipeline[slack]") from error
    url = _secret(channel.webhook_env)
    silent = logging.getLogger(f"{LOGGER}.slack_sdk")
    silent.setLevel(logging.CRITICAL + 1)  # Its lines name the URL.
    client = WebhookClient(url, timeout=TIMEOUT_SECONDS, logger=silent, retry_handlers=[])
    try:
        # Slack reads these three characters as markup: no row of a delivery can call a channel.
        response = client.send(text=html.escape(f"*{alert.subject}*\n{alert.text}", quote=False))
    except OSError as error:
        raise AlertError(f"{error}; check the network, and the URL in {channel.webhook_env}") from None
    except Exception as error:  # noqa: BLE001 - other errors may hold the URL, or a part of it: only their kind is said.
        raise AlertError(f"{type(error).__name__}; check the URL in {channel.webhook_env}") from None
    if response.status_code != 200:
        # Another server than Slack's may answer with what it was asked, which is the URL.
        said = f" ({response.body!r})" if _SLACK_CODE.fullmatch(response.body) else ""
        raise AlertError(f"Slack answered {response.status_code}{said}; check the URL in {channel.webhook_env}")


# --- a function of the user's own ----------------------------------------------------------------------------------


def _resolve(target: str) -> Callable[[Alert], Any]:
    """The function that `module:function` names. Raises `AlertError` where there is none."""
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise AlertError(f"{target!r} cannot be imported ({error}); check alerts.channels and PYTHONPATH") from error
    if not callable(function):
        raise AlertError(f"{target!r} is no function but {type(function).__name__}; name one that takes an Alert")
    return function
