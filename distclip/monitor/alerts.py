"""Send alerts about unusual steps: call functions, or post to a webhook without waiting for it."""

from __future__ import annotations

import atexit
import json
import math
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ..errors import ArgumentError, short_repr
from .jsonl import UPDATE_RMS_ALARM, finite

__all__ = ["MIN_RATIO", "Alert", "Webhook", "make_alert", "to_alerts"]

Alert: TypeAlias = Callable[[dict[str, Any]], None]
"""Function of the fields of an alert: see `make_alert`."""

MIN_RATIO = 3.0
"""Minimum ratio of a norm to the running median for an alert, as for a spike of the analysis."""

MAX_PENDING = 100
"""Maximum number of alerts that wait for a webhook. Any more are dropped."""

MAX_IDS = 100
"""Maximum number of sample ids of an alert."""

EXIT_SECONDS = 3.0
"""Maximum time to wait at exit for alerts that are being posted."""


class Webhook:
    """Posts alerts as JSON to a URL, from a thread.

    Slack, Mattermost and Discord's /slack read the field `text`. A call only queues the alert, so that training never
    waits. If a post fails, the webhook warns once at a later call.

    Args:
        url: http:// or https://.
        headers: headers of the requests, such as {"Authorization": "Bearer …"}.
        timeout: seconds that one post may take.

    Raises:
        ArgumentError: the URL has another scheme or no host.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, timeout: float = 10.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ArgumentError(f"alerts={url[:60]!r}: not the URL of a webhook. Use https://HOST/PATH.")
        # The path of a webhook is a secret, so no message contains it.
        self._name = f"{parts.scheme}://{parts.hostname}/…"
        self._url, self._timeout = url, timeout
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._pending: queue.Queue[bytes] = queue.Queue(MAX_PENDING)
        self._thread: threading.Thread | None = None
        self._failure = ""
        self._has_warned = False

    def __call__(self, alert: dict[str, Any]) -> None:
        """Put an alert into the queue, or drop it if too many are waiting."""
        if self._failure and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"recorder: alerts to {self._name} fail: {self._failure}", RuntimeWarning, stacklevel=2)
        if self._thread is None:
            self._thread = threading.Thread(target=self._post_all, name="distclip-webhook", daemon=True)
            self._thread.start()
            atexit.register(self.wait, EXIT_SECONDS)
        try:
            self._pending.put_nowait(json.dumps(finite(alert), allow_nan=False, default=str).encode())
        except queue.Full:
            self._failure = f"more than {MAX_PENDING} alerts are waiting, and others were dropped"

    def wait(self, seconds: float) -> None:
        """Wait until all alerts are posted, but not longer than this."""
        done = self._pending.all_tasks_done
        with done:
            done.wait_for(lambda: not self._pending.unfinished_tasks, seconds)

    def _post_all(self) -> None:
        while True:
            content = self._pending.get()
            try:
                with urlopen(Request(self._url, content, self._headers), timeout=self._timeout) as response:
                    response.read(1 << 16)
            except Exception as error:
                self._failure = f"{type(error).__name__}: {error}".replace(self._url, self._name)
            finally:
                self._pending.task_done()


def to_alerts(alerts: Any) -> tuple[Alert, ...]:
    """Convert the argument of a recorder: a function, the URL of a webhook, or several of them.

    Raises:
        ArgumentError: it is something else.
    """
    several = isinstance(alerts, Iterable) and not isinstance(alerts, str | bytes) and not callable(alerts)
    listed = [Webhook(alert) if isinstance(alert, str) else alert for alert in (alerts if several else (alerts,))]
    if not all(map(callable, listed)):
        raise ArgumentError(
            f"alerts={short_repr(alerts)}: neither functions of a dictionary nor URLs. Use alerts='https://HOST/PATH'."
        )
    return tuple(listed)


def make_alert(line: Mapping[str, Any], path: Path, names: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return an alert about the line of a step, or None if the step needs none.

    Args:
        line: line of a step: see `distclip.monitor.jsonl`.
        path: path of the file of the run.
        names: names of the slots or tensors that `update_slot` counts.

    Returns:
        `kind` ("nonfinite", "replicas", "spike" or "update"), `step`, `norm`, `run` and `text`. If known, also the
        `ratio` to the running median, `loss`, `ids`, `worst`, `culprits` and `replicas`, and for an update `rms` and
        `tensor`.

    >>> make_alert({"step": 7, "norm": 9.0, "spike": 6.0, "loss": 2.5}, Path("run/metrics.jsonl"))["text"]
    'run: the gradient norm of step 7 is 9, 6 times the median'
    >>> make_alert({"step": 8, "norm": 1.1, "loss": 2.5}, Path("run/metrics.jsonl"))
    """
    ratio, norm, step = line.get("spike"), line.get("norm", math.nan), line["step"]
    run = str(path.parent)
    if line.get("replicas"):
        kind, text = "replicas", f"replicas of {len(line['replicas'])} tensors differ between ranks at step {step}"
    elif ratio is None or not (math.isnan(ratio) or ratio >= MIN_RATIO):
        return _make_update_alert(line, run, names)
    elif math.isnan(ratio):
        kind, text = "nonfinite", f"the gradient norm of step {step} is not finite"
    else:
        kind, text = "spike", f"the gradient norm of step {step} is {norm:.3g}, {ratio:.3g} times the median"
    alert: dict[str, Any] = {"kind": kind, "step": step, "norm": norm, "run": run, "text": f"{run}: {text}"}
    fields = {"ratio": ratio, "ids": _first(line.get("ids"))}
    fields |= {key: line.get(key) for key in ("loss", "worst", "culprits", "replicas")}
    return alert | {key: value for key, value in fields.items() if value is not None}


def _make_update_alert(line: Mapping[str, Any], run: str, names: Sequence[str]) -> dict[str, Any] | None:
    rms = line.get("update_rms", math.nan)
    if rms is None or not rms >= UPDATE_RMS_ALARM:
        return None
    slot = line.get("update_slot", -1)
    tensor = names[int(slot)] if 0 <= slot < len(names) else None
    of = "" if tensor is None else f" of {tensor}"
    text = f"gradients{of} at step {line['step']} are {rms:.3g} times the roots of Adam's second moments"
    alert = {"kind": "update", "step": line["step"], "norm": line.get("norm"), "run": run, "rms": rms}
    alert |= {key: value for key, value in (("tensor", tensor), ("loss", line.get("loss"))) if value is not None}
    return alert | {"text": f"{run}: {text}. The loss may rise within a few steps"}


def _first(ids: Sequence[Any] | None) -> Sequence[Any] | None:
    return None if ids is None else ids[:MAX_IDS]
