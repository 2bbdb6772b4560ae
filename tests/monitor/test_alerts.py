"""Alerts about steps that stand out: functions, webhooks on the loopback interface, and `on_spike` on ranks."""

from __future__ import annotations

import http.server
import json
import math
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import distclip
from distclip import ArgumentError
from distclip.monitor import Recorder, Webhook
from distclip.monitor.alerts import MAX_PENDING
from tests.ranks import gather_from_ranks, on_ranks

NORMS = [1.0] * 8 + [9.0, 1.0, 2.5, math.nan, 1.0]
"""Norms of a run with a spike at step 9 and a NaN at step 12. Step 11 is not large enough for an alert."""


def record(directory: Path, norms: list[float] = NORMS, **options: Any) -> None:
    """Record a run that has these norms."""
    weight = torch.nn.Parameter(torch.zeros(1))
    clipper = distclip.GradClipper([("weight", weight)], distclip.global_norm(100.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", distclip.NonFiniteWarning)
        with Recorder(clipper, directory, **options) as recorder:
            for i, norm in enumerate(norms):
                weight.grad = torch.tensor([norm])
                clipper.clip()
                recorder.note(loss=0.5, ids=[i])


class Receiver(http.server.BaseHTTPRequestHandler):
    """Server of a webhook that keeps what it receives, and fails for some paths."""

    received: list[Any]
    release: threading.Event

    def do_POST(self) -> None:
        """Answer a request after `release` is set."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.release.wait(10)
        if self.path == "/broken":
            self.send_error(500)
            return
        self.received.append((self.headers.get("X-Key"), json.loads(content)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def receiver() -> Iterator[tuple[str, type[Receiver]]]:
    """Start a server on a free port."""
    handler = type("Handler", (Receiver,), {"received": [], "release": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        handler.release.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("every", [1, 50])
def test_function(tmp_path: Path, every: int) -> None:
    alerts: list[dict[str, Any]] = []
    record(tmp_path, every=every, alerts=alerts.append)
    assert [(alert["kind"], alert["step"], alert["ids"]) for alert in alerts] == [
        ("spike", 9, [8]),
        ("nonfinite", 12, [11]),
    ]
    spike, nonfinite = alerts
    assert (spike["norm"], spike["ratio"], spike["loss"]) == (9.0, 9.0, 0.5)
    assert spike["text"] == f"{tmp_path}: the gradient norm of step 9 is 9, 9 times the median"
    assert nonfinite["culprits"][0]["name"] == "weight"


def test_function_that_raises_is_given_up(tmp_path: Path) -> None:
    def fail(alert: dict[str, Any]) -> None:
        raise OSError("no network")

    with pytest.warns(RuntimeWarning, match="no network"):
        record(tmp_path, every=1, alerts=fail)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1 + len(NORMS)


def test_webhook(tmp_path: Path, receiver: tuple[str, type[Receiver]]) -> None:
    """Training ends before the server answers. NaN is null in what the server receives."""
    url, handler = receiver
    webhook = Webhook(f"{url}/secret", {"X-Key": "key"})
    record(tmp_path, every=1, alerts=[webhook])
    assert handler.received == []
    handler.release.set()
    webhook.wait(10)
    (key, spike), (_, nonfinite) = handler.received
    assert key == "key"
    assert (spike["kind"], spike["norm"]) == ("spike", 9.0)
    assert (nonfinite["kind"], nonfinite["norm"]) == ("nonfinite", None)


@pytest.mark.parametrize("kind", ["broken", "closed"])
def test_webhook_that_fails_warns_without_its_path(kind: str, receiver: tuple[str, type[Receiver]]) -> None:
    url, handler = receiver
    handler.release.set()
    webhook = Webhook(f"{url}/broken" if kind == "broken" else "http://127.0.0.1:1/broken")
    webhook({"text": "one"})
    webhook.wait(10)
    with pytest.warns(RuntimeWarning, match=r"alerts to http://127.0.0.1/… fail") as caught:
        webhook({"text": "two"})
    assert "broken" not in str(caught[0].message)
    webhook.wait(10)
    webhook({"text": "three"})  # warns once
    webhook.wait(10)


def test_webhook_drops_what_it_cannot_deliver(receiver: tuple[str, type[Receiver]]) -> None:
    url, handler = receiver
    webhook = Webhook(url)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(MAX_PENDING + 5):
            webhook({"step": i})
    (warning,) = caught
    assert "others were dropped" in str(warning.message)
    handler.release.set()
    webhook.wait(10)
    assert MAX_PENDING <= len(handler.received) <= MAX_PENDING + 1


@pytest.mark.parametrize("alerts", ["file:///etc/passwd", "hooks.slack.com/x", "https://", 3, [None]])
def test_invalid_alerts(tmp_path: Path, alerts: Any) -> None:
    with pytest.raises(ArgumentError, match="alerts="):
        record(tmp_path, alerts=alerts)


def test_invalid_on_spike(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="on_spike=3: not a function"):
        record(tmp_path, on_spike=3)


def test_on_spike_that_raises_is_a_warning(tmp_path: Path) -> None:
    def fail(spike: dict[str, Any]) -> None:
        raise ValueError("mine")

    with pytest.warns(RuntimeWarning, match="on_spike raised ValueError: mine"):
        record(tmp_path, on_spike=fail)


@on_ranks(2)
@pytest.mark.parametrize("every", [1, 5])
def test_on_spike_is_called_on_all_ranks_together(every: int) -> None:
    """The function communicates, and gets the same fields on all ranks."""
    rank = torch.distributed.get_rank()
    weight = torch.nn.Parameter(torch.zeros(2))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    clipper = distclip.GradClipper([(f"weight.{rank}", weight)], distclip.global_norm(100.0), split_over=mesh)
    calls: list[Any] = []

    def on_spike(spike: dict[str, Any]) -> None:
        calls.append((clipper.steps, gather_from_ranks(spike), torch.is_grad_enabled()))

    directory = tempfile.TemporaryDirectory()
    recorder = Recorder(clipper, directory.name, every=every, on_spike=on_spike)
    for i in range(12):
        weight.grad = torch.full((2,), 20.0 if (i, rank) == (8, 1) else 1.0)
        clipper.clip()
        recorder.note(ids=[2 * i + rank])
    recorder.flush()
    ((steps, (mine, other), has_grad),) = calls
    assert steps == (10 if every == 1 else 11)
    assert mine == other
    assert (mine["step"], mine["ids"], mine["worst"]["rank"]) == (9, [16, 17], 1)
    assert mine["worst"]["tensor"] == "weight.1"
    assert has_grad
    recorder.close()
    directory.cleanup()
