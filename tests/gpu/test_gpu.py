"""Check norms, gradients and host syncs on a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import reference
from distclip.monitor import Recorder
from distclip.norms import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SIZES = [1, 7, 1000, 65536, 65537, 300_000]


def make_params(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.ones(n, dtype=dtype, device="cuda")) for n in SIZES]
    for param in parameters:
        param.grad = (torch.randn(param.shape, device="cuda") * scale).to(dtype)
    return parameters


def grads(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that exist."""
    return [p.grad for p in parameters if p.grad is not None]


@contextmanager
def no_syncs() -> Iterator[None]:
    """Raise at every host sync."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["triton", "operators"])
def _each_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the Triton kernels, and as without Triton."""
    if request.param == "operators":
        monkeypatch.setattr(kernels, "gpu_kernels", lambda device: None)


@pytest.mark.usefixtures("_each_kernel")
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1.0),
        (torch.float32, 1e12),
        (torch.float32, 1e-12),
        (torch.bfloat16, 1.0),
        (torch.float16, 300.0),
        (torch.float64, 1.0),
    ],
)
def test_norm_and_gradients(dtype: torch.dtype, scale: float, norm_type: float) -> None:
    parameters = make_params(dtype, scale)
    before = [g.clone() for g in grads(parameters)]
    expected = reference.total_norm([g.cpu() for g in before], norm_type)
    norm = distclip.clip_grad_norm_(parameters, math.inf, norm_type)
    torch.testing.assert_close(norm.double().cpu(), expected, rtol=1e-6, atol=0)
    assert all(torch.equal(g, old) for g, old in zip(grads(parameters), before, strict=True))
    distclip.clip_grad_norm_(parameters, float(expected) / 2, norm_type)
    rtol = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    for grad, old in zip(grads(parameters), before, strict=True):
        torch.testing.assert_close(grad.double(), old.double() * 0.5, rtol=rtol, atol=1e-7)


@pytest.mark.usefixtures("_each_kernel")
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_host_does_not_wait(max_norm: float) -> None:
    """Call clip_grad_norm_, and step() with a fused optimizer, which skips a non-finite step by itself."""
    parameters = make_params()
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    clipper = distclip.GradClipper(parameters, distclip.global_norm(max_norm), on_nonfinite="skip")
    distclip.clip_grad_norm_(parameters, max_norm)
    clipper.step(optimizer)
    with no_syncs():
        distclip.clip_grad_norm_(parameters, max_norm)
    before = [p.detach().clone() for p in parameters]
    parameters[3].grad[17] = math.nan  # type: ignore[index]
    torch.cuda.synchronize()
    clipper.step(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_starts_three_kernels() -> None:
    """Count kernels: one reads, one adds, one scales. Others are small ones of torch."""
    parameters = make_params()
    distclip.clip_grad_norm_(parameters, 1e9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        distclip.clip_grad_norm_(parameters, 1e9)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    assert sum(name in ("powers", "gather", "scale") for name in names) == 3, names


@pytest.mark.usefixtures("_each_kernel")
def test_cuda_graph_replays_on_other_numbers() -> None:
    parameters = make_params()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            distclip.clip_grad_norm_(parameters, 1.0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = distclip.clip_grad_norm_(parameters, 1.0)
    for scale in (3.0, 1e-4, 1e25):
        for grad in grads(parameters):
            grad.normal_().mul_(scale)
        expected = reference.total_norm([g.cpu() for g in grads(parameters)])
        graph.replay()
        torch.testing.assert_close(norm.double().cpu(), expected, rtol=1e-6, atol=0)
        after = reference.total_norm([g.cpu() for g in grads(parameters)])
        torch.testing.assert_close(after, expected.clamp(max=1.0), rtol=1e-5, atol=0)


def test_more_elements_than_an_int32_can_index() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of GPU memory are free")
    grad = torch.ones((1 << 31) + 12345, dtype=torch.bfloat16, device="cuda")
    grad[-1] = 1000
    result = kernels.power_sums([grad], 2.0, grad.device)[0]
    assert result.tolist() == [(1 << 31) + 12344 + 1e6]


def test_allocates_little_memory() -> None:
    parameters = make_params()
    distclip.clip_grad_norm_(parameters, 0.5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distclip.clip_grad_norm_(parameters, 0.5)
    assert torch.cuda.max_memory_allocated() - before < 1 << 16


def test_recorder_has_no_host_sync_between_writes(tmp_path: Path) -> None:
    parameters = make_params()
    clipper = distclip.GradClipper(parameters, distclip.global_norm(1.0), on_nonfinite="propagate")
    recorder = Recorder(clipper, tmp_path, every=4, per_tensor=True)
    for guard in (nullcontext(), no_syncs()):  # the first writes copy constants to the device
        with guard:
            for _ in range(2):
                clipper.clip()
                recorder.note(loss=torch.ones((), device="cuda"), lr=0.1)
    recorder.flush()
    rows = [json.loads(line) for line in recorder.path.read_text().splitlines()][1:]
    assert [row["loss"] for row in rows] == [1.0] * 4
    assert len(rows[0]["tensor_norms"]) == len(SIZES)
