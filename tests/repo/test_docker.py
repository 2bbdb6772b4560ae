"""The images' files and the shell scripts: linted, and they name what exists. docker/verify.sh builds and runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SCRIPTS = [
    *sorted(ROOT.glob("launch/**/*.sh")),
    *ROOT.glob("launch/*.sbatch"),
    *sorted(ROOT.glob("docker/*.sh")),
    ROOT / ".ci/run",
]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())

each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def lint(tool: str, *arguments: object) -> None:
    """Run a linter of the extra `dev`, which not every platform has a wheel of."""
    where = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if where is None:
        pytest.skip(f"no {tool} on this platform")
    done = subprocess.run([where, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def sources(path: Path) -> set[str]:
    """What a Dockerfile takes from the build context, copied or mounted."""
    text = path.read_text()
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)]
    mounts = re.findall(r"--mount=type=bind,(?!from)source=([^,]+)", text)
    return {name for names in copied for name in names} | set(mounts)


def admitted() -> set[str]:
    """What .dockerignore lets into the build context."""
    return {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}


@each_dockerfile
def test_dockerfiles_are_linted(path: Path) -> None:
    lint("hadolint", path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_linted(path: Path) -> None:
    lint("shellcheck", "--external-sources", path)


@each_dockerfile
def test_sources_are_in_the_build_context(path: Path) -> None:
    assert sources(path) <= admitted()
    assert [name for name in admitted() if not (ROOT / name).exists()] == []


def test_the_build_context_holds_nothing_in_vain() -> None:
    assert admitted() == set().union(*map(sources, DOCKERFILES))


@each_dockerfile
def test_torch_is_the_one_of_the_setup(path: Path) -> None:
    pins = [set(re.findall(r"torch==([\d.]+)", text.read_text())) for text in (path, ROOT / "launch/setup.sh")]
    assert pins[0] == pins[1]
    assert len(pins[0]) == 1


@each_dockerfile
def test_the_image_runs_as_another_than_root(path: Path) -> None:
    users = re.findall(r"^USER (.*)$", path.read_text(), flags=re.MULTILINE)
    assert users
    # By number: what forbids root, as Kubernetes can, does not look names up.
    assert int(users[-1]) > 0


def test_the_two_images_differ_in_base_and_torch_only() -> None:
    """Between them a line is changed in both or in neither."""
    cpu, cuda = (path.read_text().partition("\nFROM python\n")[2].splitlines() for path in DOCKERFILES)
    assert len(cpu) == len(cuda) > 10
    assert [line for line, other in zip(cpu, cuda, strict=True) if line != other] == [
        "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the images' Python reads TOML, this one does not")
def test_requirements_are_those_of_the_extras() -> None:
    def needed(extras: str) -> list[str]:
        command = [sys.executable, "docker/requirements.py", extras]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    assert needed("mpi") == ["torch>=2.10", "mpi4py>=4"]
    train = needed("train,mpi")
    assert set(needed("report")) < set(train)
    assert any(line.startswith("hydra-core") for line in train)
    assert not [line for line in train if line.startswith("distclip")]


def test_compose_starts_one_world() -> None:
    services = COMPOSE["services"]
    environments = [service["environment"] for service in services.values()]
    assert all(environment == environments[0] for environment in environments)
    assert environments[0]["NNODES"] == len(services)
    assert environments[0]["HEAD"] in services
    assert len({tuple(service["networks"]) for service in services.values()}) == 1
    for name, service in services.items():
        # torchrun's head finds itself by its host name; others find it by the service's.
        assert service["hostname"] == name
        assert service["command"] == services[environments[0]["HEAD"]]["command"]
    late = [name for name in services if name != environments[0]["HEAD"]]
    assert all(services[name]["depends_on"] == [environments[0]["HEAD"]] for name in late)


def test_compose_names_what_exists() -> None:
    builds = [service["build"] for service in COMPOSE["services"].values() if "build" in service]
    # Two that build one image would both tag it.
    (build,) = builds
    context = (ROOT / "docker" / build["context"]).resolve()
    assert context == ROOT
    assert context / build["dockerfile"] in DOCKERFILES
    for service in COMPOSE["services"].values():
        assert (ROOT / service["command"][1]).is_file()
        assert {volume.split(":")[0] for volume in service["volumes"]} == set(COMPOSE["volumes"])
        assert set(service["networks"]) == set(COMPOSE["networks"])
        # The volume takes over the owner of what the image has there.
        (place,) = (volume.split(":")[1] for volume in service["volumes"])
        (home,) = re.findall(r"^WORKDIR (/home/.*)$", (context / build["dockerfile"]).read_text(), flags=re.MULTILINE)
        assert place == f"{home}/outputs"
