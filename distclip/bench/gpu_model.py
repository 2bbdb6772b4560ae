"""Compute the time of a step on other GPUs from their data sheets: `python -m distclip.bench --model`.

Nothing in this module is measured. A time is the largest of the times that memory traffic and each unit would take
alone. A real step takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["GPUS", "WORKS", "Gpu", "Work", "model_rows", "model_table", "seconds_by_unit"]

ELEMENTS = 1_000_000_000
"""Number of gradient elements of the modelled step."""

_DATA_SHEETS = {
    "H100": "NVIDIA H100 Tensor Core GPU datasheet (SXM)",
    "H200": "NVIDIA H200 Tensor Core GPU datasheet (SXM)",
    "B200": "NVIDIA GB200 NVL72 datasheet, Blackwell GPU of HGX B200",
    "B300": "NVIDIA Blackwell Ultra datasheet, Blackwell Ultra GPU of HGX B300",
    "L4": "NVIDIA L4 Tensor Core GPU datasheet; float64 is 1/64 of float32 (Ada GPU architecture whitepaper)",
    "L40S": "NVIDIA L40S datasheet; float64 is 1/64 of float32 (Ada GPU architecture whitepaper)",
    "A10": "NVIDIA A10 Tensor Core GPU datasheet; float64 is 1/64 of float32 (Ampere GA102 whitepaper)",
    "RTX 4090": "NVIDIA Ada GPU architecture whitepaper, appendix A",
    "RTX 5090": "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A",
    "RTX PRO 6000": "NVIDIA RTX PRO 6000 Blackwell datasheet; float64 is 1/64 of float32 (RTX Blackwell whitepaper)",
}

SOURCE_OF_CONVERSIONS = "CUDA C++ Programming Guide, table Throughput of Native Arithmetic Instructions"
"""Source of `Gpu.conversions_per_clock` and of the other rates per clock.

A multiprocessor with 128 float32 lanes has 64 integer lanes, and 16 for other conversions. B300 is assumed to convert
as slowly as the other GPUs with few float64 units.
"""


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU by its data sheet.

    Args:
        name: name of the card.
        architecture: compute capability times ten.
        bandwidth: bandwidth of the memory, bytes/s.
        float32: floating-point operations/s, two for a fused multiply-add.
        float64: the same for float64.
        conversions_per_clock: number of conversions from and to float64 per clock on one multiprocessor, which has 128
            float32 lanes.
    """

    name: str
    architecture: int
    bandwidth: float
    float32: float
    float64: float
    conversions_per_clock: int

    @property
    def source(self) -> str:
        """Document that has the rates."""
        return _DATA_SHEETS[self.name]

    @property
    def instructions(self) -> float:
        """Float32 instructions of all lanes per second, a fused multiply-add counted once."""
        return self.float32 / 2

    @property
    def conversions(self) -> float:
        """Conversions from and to float64 per second."""
        return self.instructions / 128 * self.conversions_per_clock


GPUS = (
    Gpu("H100", 90, 3.35e12, 67e12, 34e12, 16),
    Gpu("H200", 90, 4.8e12, 67e12, 34e12, 16),
    Gpu("B200", 100, 7.7e12, 75e12, 37e12, 16),
    Gpu("B300", 103, 8.0e12, 75e12, 1.25e12, 2),
    Gpu("L4", 89, 0.300e12, 30.3e12, 30.3e12 / 64, 2),
    Gpu("L40S", 89, 0.864e12, 91.6e12, 91.6e12 / 64, 2),
    Gpu("A10", 86, 0.600e12, 31.2e12, 31.2e12 / 64, 2),
    Gpu("RTX 4090", 89, 1.008e12, 82.6e12, 82.6e12 / 64, 2),
    Gpu("RTX 5090", 120, 1.792e12, 104.8e12, 104.8e12 / 64, 2),
    Gpu("RTX PRO 6000", 120, 1.792e12, 125e12, 125e12 / 64, 2),
)
"""Ten GPUs that are common for training."""


@dataclass(frozen=True)
class Work:
    """Work of one step for each element.

    Args:
        who: "distclip" or "torch".
        dtype: dtype of the gradients.
        clipped: whether the step multiplies the gradients.
        bytes: number of bytes read and written.
        instructions: number of all instructions in the main loop.
        integer: number of those instructions that run at half the rate: integers, bits, minimum and maximum.
        float64: number of float64 instructions.
        conversions: number of conversions from and to float64.
        other_conversions: number of conversions between float32 and bfloat16.
    """

    who: str
    dtype: str
    clipped: bool
    bytes: float
    instructions: float
    integer: float
    float64: float = 0.0
    conversions: float = 0.0
    other_conversions: float = 0.0


_SIZES = {"fp32": 4, "bf16": 2}

# Instructions for one element in the loop over full blocks, and those at half rate, counted in machine code for sm_90
# and rounded up. They include the checksums that compare replicas in the same pass. The numbers for torch are
# estimates: a conversion, a multiplication and a load.
_MEASURE = {"fp32": (4.5, 2.0), "bf16": (6.0, 3.5)}
_TORCH_MEASURE = {"fp32": (2.0, 0.5), "bf16": (3.0, 1.5)}
_SCALE = {"fp32": (2.0, 0.5), "bf16": (3.0, 1.5)}
_SCALE_CONVERSIONS = {"fp32": 0.0, "bf16": 0.5}

# One addition and two conversions by each of 256 threads for a chunk of 65,536 elements.
_FLOAT64, _CONVERSIONS_OF_CHUNKS = 1 / 256, 2 / 256


def _works() -> Iterator[Work]:
    for dtype, size in _SIZES.items():
        scale, conversions = _SCALE[dtype], _SCALE_CONVERSIONS[dtype]
        for clipped in (False, True):
            # torch always multiplies, so it makes one pass that reads, and one that reads and writes.
            issued, integer = (a + b for a, b in zip(_TORCH_MEASURE[dtype], scale, strict=True))
            yield Work("torch", dtype, clipped, 3 * size, issued, integer, other_conversions=conversions)
            issued, integer = (a + b * clipped for a, b in zip(_MEASURE[dtype], scale, strict=True))
            traffic = size + 2 * size * clipped
            chunks = (_FLOAT64, _CONVERSIONS_OF_CHUNKS)
            yield Work("distclip", dtype, clipped, traffic, issued, integer, *chunks, conversions * clipped)


WORKS = tuple(_works())
"""Unclipped and clipped steps in each dtype."""


def seconds_by_unit(gpu: Gpu, work: Work, elements: int = ELEMENTS) -> dict[str, float]:
    """Compute the time that each unit of a GPU needs for a step, in seconds.

    >>> times = seconds_by_unit(GPUS[0], WORKS[1])
    >>> max(times, key=times.__getitem__)
    'memory'
    """
    per_element = {
        "memory": work.bytes / gpu.bandwidth,
        "float32": work.instructions / gpu.instructions,
        "integer": work.integer / (gpu.instructions / 2),
        "float64": work.float64 / (gpu.float64 / 2),
        "conversions": work.conversions / gpu.conversions + work.other_conversions / (gpu.instructions / 8),
    }
    return {unit: elements * seconds for unit, seconds in per_element.items()}


def model_rows() -> list[tuple[Gpu, Work, dict[str, float]]]:
    """Return every GPU with every step and the time of each unit."""
    return [(gpu, work, seconds_by_unit(gpu, work)) for gpu in GPUS for work in WORKS]


def model_table() -> str:
    """Return the Markdown table of all GPUs and steps, with the sources of its numbers."""
    lines = [
        f"Computed from data sheets, not measured. Milliseconds for {ELEMENTS:,} elements, if nothing but one unit",
        "took time. Peak rates, so that a real step takes longer.",
        "",
        "| GPU | step | who | memory | float32 | integer | float64 | conversions | slowest unit |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for gpu, work, times in model_rows():
        step = f"{work.dtype}, {'clipped' if work.clipped else 'unclipped'}"
        cells = " | ".join(f"{1e3 * seconds:.3f}" for seconds in times.values())
        slowest = max(times, key=times.__getitem__)
        lines.append(f"| {gpu.name} | {step} | {work.who} | {cells} | {slowest} |")
    lines += [
        "",
        "| GPU | memory TB/s | float32 TFLOP/s | float64 TFLOP/s | conversions/clock | source |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for gpu in GPUS:
        rates = f"{gpu.bandwidth / 1e12:.3g} | {gpu.float32 / 1e12:.3g} | {gpu.float64 / 1e12:.3g}"
        lines.append(f"| {gpu.name} | {rates} | {gpu.conversions_per_clock} | {gpu.source} |")
    lines += ["", f"Rates per clock: {SOURCE_OF_CONVERSIONS}. Computed, not measured."]
    return "\n".join(lines)
