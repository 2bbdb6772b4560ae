"""Lint Dockerfiles and shell scripts, and check that their paths exist. docker/verify.sh builds and runs the images."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import distclip

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SCRIPTS = [
    *sorted(ROOT.glob("launch/**/*.sh")),
    *ROOT.glob("launch/*.sbatch"),
    *sorted(ROOT.glob("docker/*.sh")),
    ROOT / ".ci/run",
]
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())

each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def lint(tool: str, *arguments: object) -> None:
    """Run a linter of the extra `dev`. Skip the test on a platform that has no wheel of it."""
    where = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if where is None:
        pytest.skip(f"no {tool} on this platform")
    done = subprocess.run([where, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build_inputs(path: Path) -> set[str]:
    """Return the paths that a Dockerfile copies or mounts from the build context."""
    text = path.read_text()
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)]
    mounts = re.findall(r"--mount=type=bind,(?!from)source=([^,]+)", text)
    return {name for names in copied for name in names} | set(mounts)


def context_paths() -> set[str]:
    """Return the paths that .dockerignore admits to the build context."""
    return {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}


@each_dockerfile
def test_dockerfiles_pass_hadolint(path: Path) -> None:
    lint("hadolint", path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    lint("shellcheck", "--external-sources", path)


@each_dockerfile
def test_build_inputs_are_in_the_context(path: Path) -> None:
    assert build_inputs(path) <= context_paths()
    assert [name for name in context_paths() if not (ROOT / name).exists()] == []


def test_context_has_no_unused_paths() -> None:
    assert context_paths() == set().union(*map(build_inputs, DOCKERFILES))


@each_dockerfile
def test_torch_is_pinned_as_in_the_setup(path: Path) -> None:
    pins = [set(re.findall(r"torch==([\d.]+)", text.read_text())) for text in (path, ROOT / "launch/setup.sh")]
    assert pins[0] == pins[1]
    assert len(pins[0]) == 1


def first_stages(text: str) -> list[str]:
    """Return the images that a Dockerfile takes from a registry, with the defaults of its arguments."""
    defaults = dict(re.findall(r"^ARG (\w+)=(.*)$", text.partition("\nFROM ")[0], flags=re.MULTILINE))
    stages: set[str] = set()
    images = []
    for image, name in re.findall(r"^FROM (\S+)(?: AS (\S+))?$", text, flags=re.MULTILINE):
        if image not in stages:
            images.append(re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], image))
        stages.add(name)
    return images


@each_dockerfile
def test_base_images_are_pinned_by_tag_and_digest(path: Path) -> None:
    text = path.read_text()
    # A FROM of another form would not be checked.
    assert len(re.findall("^FROM ", text, flags=re.MULTILINE)) == 3
    (base,) = first_stages(text)
    named = re.findall(r"(?:python|nvidia/cuda):\S+", text)
    assert base in named
    for image in named:
        tag, _, digest = image.partition("@sha256:")
        # The command that refreshes the digest names the tag alone.
        if f"imagetools inspect --format '{{{{.Manifest.Digest}}}}' {image}\n" not in text:
            assert re.fullmatch("[0-9a-f]{64}", digest), image
            assert re.fullmatch(r"[\w./-]+:[\w.-]+", tag), image
    assert f"imagetools inspect --format '{{{{.Manifest.Digest}}}}' {base.partition('@')[0]}\n" in text


def test_labels_describe_the_project() -> None:
    title, _, description = CITATION["title"].partition(": ")
    for path in DOCKERFILES:
        text = path.read_text()
        final = text.rpartition("\nFROM ")[2]
        arguments = dict(re.findall(r"^ARG (\w+)(?:=(.*))?$", final, flags=re.MULTILINE))
        labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', final))
        assert arguments | {"VERSION": distclip.__version__, "REVISION": "", "CREATED": ""} == arguments
        assert labels == {
            "title": title,
            "description": description[0].upper() + description[1:],
            "version": "$VERSION",
            "revision": "$REVISION",
            "created": "$CREATED",
            "source": CITATION["repository-code"],
            "licenses": CITATION["license"],
        }


@each_dockerfile
def test_image_does_not_run_as_root(path: Path) -> None:
    users = re.findall(r"^USER (.*)$", path.read_text(), flags=re.MULTILINE)
    assert users
    # A number, because Kubernetes does not resolve names when it forbids root.
    assert int(users[-1]) > 0


def test_images_differ_only_in_base_and_torch() -> None:
    """A line must be changed in both Dockerfiles or in neither."""
    cpu, cuda = (path.read_text().partition("\nFROM python\n")[2].splitlines() for path in DOCKERFILES)
    assert len(cpu) == len(cuda) > 10
    assert [line for line, other in zip(cpu, cuda, strict=True) if line != other] == [
        "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib needs Python 3.11, which the images have")
def test_requirements_match_the_extras() -> None:
    def requirements(extras: str) -> list[str]:
        command = [sys.executable, "docker/requirements.py", extras]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    assert requirements("mpi") == ["torch>=2.10", "mpi4py>=4"]
    train = requirements("train,mpi")
    assert set(requirements("report")) < set(train)
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
        # torchrun's head node resolves its own host name, and the other nodes resolve the name of the service.
        assert service["hostname"] == name
        assert service["command"] == services[environments[0]["HEAD"]]["command"]
    other_nodes = [name for name in services if name != environments[0]["HEAD"]]
    assert all(services[name]["depends_on"] == [environments[0]["HEAD"]] for name in other_nodes)


def test_compose_refers_to_existing_files() -> None:
    builds = [service["build"] for service in COMPOSE["services"].values() if "build" in service]
    # With two services that build the same image, both would tag it.
    (build,) = builds
    context = (ROOT / "docker" / build["context"]).resolve()
    assert context == ROOT
    assert context / build["dockerfile"] in DOCKERFILES
    for service in COMPOSE["services"].values():
        assert (ROOT / service["command"][1]).is_file()
        assert {volume.split(":")[0] for volume in service["volumes"]} == set(COMPOSE["volumes"])
        assert set(service["networks"]) == set(COMPOSE["networks"])
        # A new volume inherits the owner of the folder that the image has at this path.
        (mount_point,) = (volume.split(":")[1] for volume in service["volumes"])
        (home,) = re.findall(r"^WORKDIR (/home/.*)$", (context / build["dockerfile"]).read_text(), flags=re.MULTILINE)
        assert mount_point == f"{home}/outputs"
