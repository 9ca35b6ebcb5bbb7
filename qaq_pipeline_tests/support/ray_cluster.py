"""A real Ray cluster of two nodes on this machine, each with a core and a GPU that is only counted."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray

LOOPBACK = "127.0.0.1"
RAY = Path(sys.executable).with_name("ray")
REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 120.0
_MEMORY = 100_000_000
"""Bytes of the object store of a node."""


@contextmanager
def two_nodes(client_port: int = 0, job_port: int = 0) -> Iterator[str]:
    """The address of a cluster with two nodes, which end with the context; this process is connected to none.

    Args:
        client_port: where it also listens for `ray://`; 0: nowhere.
        job_port: where its server of jobs listens; 0: it has none.
    """
    with ExitStack() as nodes, socket.socket() as probe:
        # Short, since Ray puts sockets there; not the temporary folder of the test.
        folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
        nodes.callback(shutil.rmtree, folder, ignore_errors=True)
        probe.bind((LOOPBACK, 0))
        address = f"{LOOPBACK}:{probe.getsockname()[1]}"
        probe.close()  # The head takes this port.
        head = ["--head", f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}"]
        head += [f"--ray-client-server-port={client_port}"] if client_port else []
        jobs = ["--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={job_port}"]
        nodes.enter_context(_node([*head, *(jobs if job_port else ["--include-dashboard=false"])]))
        nodes.enter_context(_node([f"--address={address}"]))
        nodes.callback(ray.shutdown)
        _wait_for(address)
        yield address


@contextmanager
def _node(arguments: list[str]) -> Iterator[None]:
    options = [f"--node-ip-address={LOOPBACK}", "--num-cpus=1", "--num-gpus=1", f"--object-store-memory={_MEMORY}"]
    path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])  # A step is the command `dagster`.
    node = subprocess.Popen(
        [RAY, "start", "--block", "--disable-usage-stats", *arguments, *options],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def _wait_for(address: str) -> None:
    """Connect this process as soon as both nodes are up."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            ray.init(address, log_to_driver=False, configure_logging=False)
        except ConnectionError:
            assert time.monotonic() < end, f"no Ray cluster came up at {address}"
            time.sleep(0.5)
            continue
        break
    while ray.cluster_resources().get("GPU", 0) < 2:
        assert time.monotonic() < end, f"the second node did not join {address}"
        time.sleep(0.2)
    ray.shutdown()
