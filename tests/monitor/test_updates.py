"""Alarms about steps of Adam with second moments that are too old, from the recorder to the diagnosis."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distclip
from distclip.monitor import Recorder
from distclip.monitor.analysis.alarms import find_alarms
from distclip.monitor.analysis.diagnosis import diagnose
from distclip.monitor.analysis.log import read
from tests.logs import HEADER, make_lines, steady_norms, write_run
from tests.ranks import on_ranks
from tests.rig import build_rig


def test_recorder_announces_a_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # The gradient of the second parameter is so small that the norm does not show it.
    weight, shift = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight, shift])
    clipper = distclip.GradClipper([("weight", weight), ("shift", shift)], distclip.global_norm(1e6))
    alerts: list[dict[str, Any]] = []
    with Recorder(clipper, tmp_path, every=1, per_tensor=True, updates=True, alerts=alerts.append) as recorder:
        for step in range(80):
            optimizer.zero_grad()
            (torch.randn(16, 4) @ weight + 1e-3 * shift).square().mean().backward()
            if step in (70, 71, 72):
                assert shift.grad is not None
                shift.grad.mul_(100.0)
            report = clipper.step(optimizer)
            recorder.note(loss=1.0 if step < 74 else 9.0)
    assert report.update_rms is not None
    assert report.update_rms.shape == (2,)
    updates = [alert for alert in alerts if alert["kind"] == "update"]
    assert [(alert["step"], alert["tensor"]) for alert in updates] == [(71, "shift")]
    assert updates[0]["rms"] > 3
    log = read(tmp_path)
    assert [alarm.step for alarm in find_alarms(log) if alarm.kind == "update"] == [71]
    (finding,) = [finding for finding in diagnose(log) if finding.rule == "old moments"]
    assert "step 71" in finding.evidence
    assert "shift" in finding.evidence
    assert "The loss rose within 16 steps of 71" in finding.evidence


def test_steady_updates_are_no_alarm(tmp_path: Path) -> None:
    lines = make_lines(steady_norms(300), lambda step: {"update_rms": None if step == 1 else 1.0 + step % 2})
    log = read(write_run(tmp_path / "run", HEADER, lines))
    assert math.isnan(log.columns["update_rms"][0])
    assert not find_alarms(log)
    assert "old moments" not in {finding.rule for finding in diagnose(log)}


def test_a_bound_on_norms_is_no_remedy_for_a_bound_on_updates(tmp_path: Path) -> None:
    lines = make_lines(steady_norms(300), bound=0.1)
    for policy, remedy in (("update_clip(1.0)", "raise max_rms"), ("global_norm(0.1)", "distclip suggest")):
        (finding,) = diagnose(read(write_run(tmp_path / policy, {**HEADER, "policy": policy}, lines)))
        assert finding.rule == "clip rate"
        assert remedy in finding.advice


@pytest.mark.parametrize(("loss", "expected"), [(2.0, False), (None, True)])
def test_alarms_without_a_rise_of_the_loss_are_no_finding(tmp_path: Path, loss: float | None, expected: bool) -> None:
    lines = make_lines(steady_norms(300), lambda step: {"update_rms": 9.0 if step == 200 else 1.0, "loss": loss})
    log = read(write_run(tmp_path / "run", HEADER, lines))
    assert find_alarms(log)
    assert [finding.rule for finding in diagnose(log)] == ["old moments"] * expected


@pytest.mark.parametrize("policy", ["global_norm(1.0)", "update_clip(2.3)"])
def test_the_policy_that_a_run_has_is_not_recommended(tmp_path: Path, policy: str) -> None:
    lines = make_lines(
        steady_norms(300),
        lambda step: {"update_rms": 9.0 if step == 200 else 1.0, "loss": 5.0 if step == 205 else 2.0},
    )
    log = read(write_run(tmp_path / "run", {**HEADER, "policy": policy}, lines))
    (finding,) = [finding for finding in diagnose(log) if finding.rule == "old moments"]
    assert ("Use distclip.update_clip()" in finding.advice) is policy.startswith("global_norm")
    assert "lower beta2" in finding.advice


@on_ranks(2)
def test_ranks_record_the_rms_of_whole_tensors() -> None:
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(1e6))
    clipper.measure_tensors()
    clipper.measure_updates()
    optimizer = rig.optimizer("adamw")
    found = []
    for step, factor in enumerate((1.0, 1.0, 1.0, 20.0)):
        rig.fill(step, factor)
        report = clipper.step(optimizer)
        assert report.update_rms is not None
        found.append(report.update_rms)
    assert len(found[0]) == len(clipper.tensors)
    assert bool(found[0].isnan().all())
    assert float(found[2].max()) < 2 < 1.8 * float(found[3].min())
