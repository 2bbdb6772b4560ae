"""Check the import graph: a module imports only from rows above its own, and there are no cycles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.repo.source import ROOT, cycles, files, imports, module_imports, relative

ROWS = [
    ["_version", "errors", "devices", "reference", "conf"],
    ["comm", "_console"],
    ["sharding"],
    ["norms"],
    ["policies"],
    ["recipes", "nonfinite", "replicas", "apply"],
    ["outcome", "checkpoint"],
    ["engine"],
    ["backward", "tenants", "graphs"],
    ["functional", "clipper"],
    ["auditing", "extend", "_public", "__init__"],
    ["monitor", "integrations", "bench", "testing"],
    ["__main__"],
]
"""Folders and top-level modules of distclip, from the bottom of the import graph to its top."""

LAUNCH_STAGES = [
    ["job.slurm"],
    [
        "job.processes",
        "job.elastic",
        "job.untrusted",
        "comparison.layouts",
        "comparison.policies",
        "comparison.adam_spikes",
    ],
    ["job.devices", "job.data", "comparison.framework", "comparison.adam_spikes", "comparison.incidents"],
    ["job.models", "job.mesh", "comparison.measurement"],
    ["job.inject", "job.checkpoint", "job.probes", "comparison.table"],
    ["job.parallel", "job.log", "job.replay"],
    ["job.config", "job.table"],
    ["job.run", "job.terminal", "job.overrides"],
    ["job.loop"],
    ["train", "truth", "in_backward", "ray_train", "check_overrides", "run_torchrun", "job", "comparison"],
]
"""Parts of the training job and scripts of launch/, from the bottom of the import graph to its top."""

ROW = {name: i for i, names in enumerate(ROWS) for name in names}

PUBLIC = {"extend", "_public", "__init__"}
"""Modules that collect public names, also from their own row."""

WITHOUT_RANKS = {
    "policies",
    "apply",
    "nonfinite",
    "replicas",
    "outcome",
    "checkpoint",
    "reference",
    "errors",
    "devices",
}
"""Stages that do not use torch.distributed."""

EXTRAS = {
    "bench": {"rich"},
    "norms": {"triton"},
    "comm": {"mpi4py"},
    "auditing": {"rich"},
    "integrations": {"mpi4py", "deepspeed", "hydra", "omegaconf", "lightning", "megatron", "pytorch_lightning"},
    "_console": {"rich"},
    "monitor": {"numpy", "rich", "plotly", "jinja2", "markupsafe", "matplotlib", "tensorboard", "pyarrow"}
    | {"starlette", "uvicorn"}
    | {"wandb", "mlflow", "trackio"},
}
"""Packages other than torch that a stage may import."""

MAX_TOP_LEVEL_MODULES = 12


def stage(path: Path) -> str:
    """Return the folder or the top-level module of distclip that a file belongs to."""
    return path.relative_to(ROOT / "distclip").parts[0].removesuffix(".py")


def package(path: Path) -> tuple[str, ...]:
    """Return the names of the packages that contain a module."""
    return path.relative_to(ROOT).parent.parts


def library_imports() -> list[tuple[Path, str]]:
    """List (file, absolute name) of all imports in the library."""
    return [(path, name) for path in files("distclip") for name in sorted(imports(path, package(path)))]


def test_every_module_has_a_row() -> None:
    assert {stage(path) for path in files("distclip")} <= set(ROW)


def test_imports_come_from_rows_above() -> None:
    wrong = []
    for path, name in library_imports():
        importer, parts = stage(path), name.split(".")
        if parts[0] != "distclip" or len(parts) == 1 or parts[1] == importer:
            continue
        limit = ROW[importer] + 1 if importer in PUBLIC else ROW[importer]
        if ROW[parts[1]] >= limit:
            wrong.append(f"{relative(path)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_integrations_use_extend_only() -> None:
    """A third party can then write the same integration, from public names."""
    wrong = [
        f"{relative(path)} imports {name}"
        for path, name in library_imports()
        if stage(path) == "integrations" and name.startswith("distclip.")
        if name.split(".")[1] not in {"extend", "integrations"}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycles() -> None:
    assert cycles(module_imports("distclip")) == []


def test_launch_imports_come_from_rows_above() -> None:
    graph = module_imports("launch")
    row = {name: i for i, names in enumerate(LAUNCH_STAGES) for name in names}
    stages = {module: ".".join(module.split(".")[:2]) for module in graph}
    assert set(stages.values()) == set(row)
    wrong = [
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in names
        if stages[name] != stages[module] and row[stages[name]] >= row[stages[module]]
    ]
    assert not wrong, "\n".join(wrong)
    assert cycles(graph) == []


def test_launch_has_few_top_level_modules() -> None:
    """The path of a script contains launch/, so its top-level modules could hide installed packages."""
    top = {module.split(".")[0] for module in module_imports("launch")}
    assert top == {"train", "truth", "in_backward", "ray_train", "check_overrides", "run_torchrun", "job", "comparison"}


def test_few_modules_at_the_top() -> None:
    top = [path.name for path in files("distclip") if path.parent == ROOT / "distclip"]
    assert len(top) <= MAX_TOP_LEVEL_MODULES, top


def test_stages_without_ranks() -> None:
    wrong = [
        f"{relative(path)} imports {name}"
        for path, name in library_imports()
        if stage(path) in WITHOUT_RANKS and name.startswith("torch.distributed")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_extras_need_more_than_torch() -> None:
    allowed = {"torch", "distclip", *sys.stdlib_module_names}
    wrong = [
        f"{relative(path)} imports {name}"
        for path, name in library_imports()
        # Only the build of the package imports this module.
        if path.name != "build_wheel.py" and name.split(".")[0] not in allowed | EXTRAS.get(stage(path), set())
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_starts_nothing() -> None:
    """Importing distclip creates no process group and loads no framework."""
    code = (
        "import sys, distclip, torch.distributed as dist; assert not dist.is_initialized(); "
        "print([m for m in ('hydra', 'deepspeed', 'lightning', 'mpi4py', 'rich', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_test_module_imports_another() -> None:
    """Code that several test modules share is in tests/tables/ or in a module without tests."""
    wrong = [
        f"{relative(path)} imports {name}"
        for path in files("tests")
        for name in sorted(imports(path, package(path)))
        if name.split(".")[0] == "tests" and name.split(".")[-1].startswith("test_")
    ]
    assert not wrong, "\n".join(wrong)
