"""OpenLineage events, as a receiver on this machine gets them."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from qaq_pipeline.config import Settings, SettingsError, parse_settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.open_lineage import NAME, build_open_lineage

MODELS = {"models": {"strong": {"hub": "tiny/strong"}, "weak": {"hub": "tiny/weak"}}}
ONE_DATABASE = {"module": "dagster._core.storage.event_log", "class": "ConsolidatedSqliteEventLogStorage"}

# What the integration calls is to go in Dagster 2.0, and warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Function `EventMethods.get_event_records`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Use fetch_.* instead of get_event_records:UserWarning"),
]


def settings_with(*, openlineage: bool) -> Settings:
    return parse_settings(yaml.safe_dump(MODELS | {"automation": {"openlineage": openlineage}}))


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Events that a receiver on loopback got. The integration reads its address when it is imported."""
    events: list[dict[str, Any]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_port}")
        for name in [name for name in sys.modules if name.startswith("dagster_openlineage")]:
            monkeypatch.delitem(sys.modules, name)
        yield events
        server.shutdown()


@dg.asset
def made() -> dg.MaterializeResult:
    deps = {"rmi": [dg.TableColumnDep(dg.AssetKey("logprobs"), "sum_nll_q")]}
    return dg.MaterializeResult(metadata={"dagster/column_lineage": dg.TableColumnLineage(deps)})


@pytest.fixture
def one_database(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    log = ONE_DATABASE | {"config": {"base_dir": str(tmp_path / "log")}}
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"event_log_storage": log, "telemetry": {"enabled": False}}))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


def tick(instance: dg.DagsterInstance, sensor: dg.SensorDefinition, cursor: str | None) -> Any:
    return sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=cursor))


def test_each_event_since_the_first_look_is_sent_once_with_its_column_lineage(
    received: list[dict[str, Any]], one_database: dg.DagsterInstance
) -> None:
    (sensor,) = build_open_lineage(settings_with(openlineage=True)).sensors or []
    dg.materialize([made], instance=one_database)
    first = tick(one_database, sensor, None)
    assert received == []
    for _ in range(3):
        dg.materialize([made], instance=one_database)
    second = tick(one_database, sensor, first.cursor)
    assert len([event for event in received if _is_of(event, "COMPLETE", "made")]) == 3
    assert (
        len([event for event in received if event["job"]["name"] == "__ephemeral_asset_job__"]) == 6
    )  # START and COMPLETE.
    (output,) = next(event for event in received if _is_of(event, "COMPLETE", "made"))["outputs"]
    (source,) = output["facets"]["columnLineage"]["fields"]["rmi"]["inputFields"]
    assert (source["name"], source["field"]) == ("logprobs", "sum_nll_q")
    sent = len(received)
    tick(one_database, sensor, second.cursor)
    assert len(received) == sent


def _is_of(event: dict[str, Any], kind: str, job: str) -> bool:
    return (event["eventType"], event["job"]["name"]) == (kind, job)


def test_an_event_log_in_many_files_is_refused_with_the_remedy(received: list[dict[str, Any]], tmp_path: Path) -> None:
    (sensor,) = build_open_lineage(settings_with(openlineage=True)).sensors or []
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        dg.materialize([made], instance=instance)
        skipped = tick(instance, sensor, None)
    assert "configure Postgres" in skipped.skip_message
    assert received == []


def test_nothing_is_sent_unless_the_settings_ask_for_it() -> None:
    names = {on: {one.name for one in build_defs(settings_with(openlineage=on)).sensors or []} for on in (True, False)}
    assert names[True] - names[False] == {NAME}


def test_a_missing_extra_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dagster_openlineage", None)
    with pytest.raises(SettingsError, match=r"automation.openlineage: .*pip install 'qaq-pipeline\[openlineage\]'"):
        build_open_lineage(settings_with(openlineage=True))
