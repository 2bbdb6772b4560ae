"""The import graph is the data flow: a module imports only from stages to its left."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import distclip

ROOT = Path(distclip.__file__).parent

STAGES = [
    ["_version", "_console", "errors", "devices", "reference", "conf"],
    ["comm"],
    ["sharding"],
    ["norms"],
    ["policies"],
    ["nonfinite", "apply"],
    ["report", "checkpoint"],
    ["call"],
    ["decision"],
    ["judge"],
    ["stepper", "binding"],
    ["functional", "clipper"],
    ["extend", "__init__"],
    ["bench", "integrations", "monitor"],
]
"""From left to right; stages in one line may not know each other."""

PLACE = {name: i for i, names in enumerate(STAGES) for name in names}
"""What a stage may import besides those to its left: itself."""

FREE_OF_RANKS = {"policies", "apply", "nonfinite", "report", "checkpoint", "reference", "errors", "devices"}


def modules() -> list[tuple[str, Path]]:
    """(stage, file) of the whole package."""
    files = [p for p in sorted(ROOT.rglob("*.py")) if "conf" not in p.relative_to(ROOT).parts]
    return [(p.relative_to(ROOT).parts[0].removesuffix(".py"), p) for p in files]


def imported(path: Path) -> set[str]:
    """Absolute names of what a file imports at any level."""
    package = ["distclip", *path.relative_to(ROOT).parent.parts]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, *([node.module] if node.module else [])]))
    return names


def test_every_module_has_a_stage() -> None:
    assert {stage for stage, _ in modules()} <= set(PLACE)


def test_imports_come_from_the_left() -> None:
    wrong = []
    for stage, path in modules():
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "distclip" and len(parts) > 1 and parts[1] != stage and PLACE[parts[1]] >= PLACE[stage]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_what_is_decided_knows_nothing_of_ranks() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for stage, path in modules()
        for name in imported(path)
        if stage in FREE_OF_RANKS and name.startswith("torch.distributed")
    ]
    assert not wrong


def test_importing_needs_torch_only() -> None:
    allowed = {"torch", "distclip"} | set(sys.stdlib_module_names)
    extras = {"bench": {"rich"}, "norms": {"triton"}, "comm": {"mpi4py"}, "integrations": {"mpi4py", "deepspeed"}}
    extras["integrations"] |= {"hydra", "omegaconf", "lightning", "megatron", "pytorch_lightning"}
    extras["_console"] = {"rich"}
    extras["monitor"] = {"numpy", "rich", "plotly", "jinja2", "markupsafe", "matplotlib"}
    extras["monitor"] |= {"tensorboard", "wandb", "mlflow", "trackio"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for stage, path in modules()
        for name in imported(path)
        if name.split(".")[0] not in allowed | extras.get(stage, set())
    ]
    assert not wrong


def test_importing_starts_nothing() -> None:
    """No process group, no accelerator, no framework."""
    code = (
        "import sys, distclip, torch.distributed as dist; assert not dist.is_initialized(); "
        "print([m for m in ('hydra', 'deepspeed', 'lightning', 'mpi4py', 'rich', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
