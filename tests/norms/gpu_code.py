"""Compile the GPU kernels for several architectures, which needs no GPU, and print facts about their code as JSON.

A separate script, because Triton either compiles or interprets in one process.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distclip.norms.kernels import triton_kernels as programs

CHUNK, THREADS = 1 << 16, 256
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TABLES = dict.fromkeys(["addresses", "lengths", "tensor_of", "start_of"], "*i64")
POWERS = TABLES | {"partial": "*fp64", "partial_words": "*i64", "first": "i32"}
SCALE = TABLES | {"coefs": "*fp64", "per_tensor": "i32"}
GATHER = {"partial": "*fp64", "partial_words": "*i64", "bounds": "*i64", "sums": "*fp64", "checksums": "*i64"}

FLOAT64 = re.compile(r"^(D(ADD|FMA|MUL|SETP|MNMX)\b|(F2F|I2F|F2I)\S*\.F64)")


def compile_kernel(program: Any, signature: dict[str, str], target: GPUTarget, **constants: Any) -> Any:
    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs={})
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options).asm


def run_tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read_nvidia(asm: Any) -> dict[str, Any]:
    """Return counts of the machine code. Instructions in loops are those before a branch back."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        sass, usage = run_tool("nvdisasm", "-c", file.name), run_tool("cuobjdump", "-res-usage", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert resources is not None, usage
    code, labels, in_loops = [], {}, set()
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)", line):
            code.append((instruction[1].rstrip(";"), instruction[2]))
            jump = re.search(r"\.L_x_\d+", instruction[2]) if instruction[1].startswith("BRA") else None
            if jump and labels.get(jump[0], len(code)) < len(code):
                in_loops |= set(range(labels[jump[0]], len(code)))
    # The loop over full blocks has most loads.
    return {
        "float64": sum(bool(FLOAT64.match(name)) for name, _ in code),
        "float64_in_loops": sum(bool(FLOAT64.match(code[i][0])) for i in in_loops),
        "float64_ptx": len(re.findall(r"^\s*(?:@!?%p\d+\s+)?(?:add|sub|mul|fma|cvt)\S*\.f64", asm["ptx"], re.M)),
        "wide_loads": sum(name.startswith("LDG") and ".128" in name for name, _ in code),
        "wide_stores": sum(name.startswith("STG") and ".128" in name for name, _ in code),
        "registers": int(resources[1]),
        "spilled": int(resources[2]) + int(resources[3]),
    }


def read_amd(asm: Any) -> dict[str, Any]:
    code = asm["amdgcn"]
    return {
        "float64": len(re.findall(r"^\s+v_\w*f64", code, re.M)),
        "wide_loads": len(re.findall(r"^\s+(?:global|buffer)_load_dwordx4", code, re.M)),
        "registers": max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", code))),
        "spilled": sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", code))),
    }


def kernels() -> Iterator[tuple[str, Any, GPUTarget]]:
    float64, float32, bfloat16, float16 = programs.ELEMENTS

    def powers(target: GPUTarget, element: Any, operation: int, words: bool, **signature: str) -> Any:
        constants = {"OPERATION": operation, "ELEMENT": element, "CHUNK": CHUNK, "ALIGNED": True, "WORDS": words}
        return compile_kernel(programs.powers, POWERS | signature, target, **constants)

    for architecture in (80, 89, 90, 100, 103, 120):
        target = GPUTarget("cuda", architecture, 32)
        yield f"squares bf16 sm_{architecture}", powers(target, bfloat16, 0, True), target
    hopper = GPUTarget("cuda", 90, 32)
    yield "squares fp32 sm_90", powers(hopper, float32, 0, False), hopper
    yield "squares fp16 sm_90", powers(hopper, float16, 0, False), hopper
    yield "magnitudes fp32 sm_90", powers(hopper, float32, 1, False), hopper
    yield "maximum bf16 sm_90", powers(hopper, bfloat16, 2, True), hopper
    yield "words fp32 sm_90", powers(hopper, float32, 3, True), hopper
    yield "maximum fp64 sm_90", powers(hopper, float64, 2, True), hopper
    pairs = powers(hopper, float32, 0, True, partial="*fp32")
    yield "pairs fp32 sm_90", pairs, hopper
    for element in (float64, float32, bfloat16):
        scale = compile_kernel(programs.scale, SCALE, hopper, ELEMENT=element, CHUNK=CHUNK, ALIGNED=True)
        yield f"scale {element.name} sm_90", scale, hopper
    yield "gather sm_90", compile_kernel(programs.gather, GATHER, hopper, OPERATION=0, WORDS=True), hopper
    narrow = GATHER | {"partial": "*fp32", "sums": "*fp32"}
    yield "gather of pairs sm_90", compile_kernel(programs.gather, narrow, hopper, OPERATION=0, WORDS=False), hopper
    mi300 = GPUTarget("hip", "gfx942", 64)
    yield "squares bf16 gfx942", powers(mi300, bfloat16, 0, True), mi300


if __name__ == "__main__":
    read = {"cuda": read_nvidia, "hip": read_amd}
    print(json.dumps({name: read[target.backend](asm) for name, asm, target in kernels()}))
