"""Build wheels for any version of Python, because the kernel has no Python ABI, and an sdist with docs and tests.

pyproject.toml names these commands of setuptools. No part of the library imports this module. If the environment
variable SOURCE_DATE_EPOCH is set to a time in seconds, both files have the same bytes whenever and wherever they are
built.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

__all__ = ["BuildKernel", "BuildSource", "BuildWheel"]

_FOLDERS = (".ci", ".github", "conf", "docker", "docs", "launch", "tests")
"""Folders of the repository that are in the sdist but not in the wheel."""


class BuildKernel(build_ext):
    """Compile native.c to `_native.so`, a name that every version of Python finds."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name without the version of Python."""
        path = Path(super().get_ext_filename(fullname))
        return str(path.with_name(path.name.partition(".")[0] + path.suffix))


class BuildWheel(bdist_wheel):
    """Tag the wheel py3-none-PLATFORM, or py3-none-any if it has no kernel.

    It has none if the environment variable DISTCLIP_PURE is 1, or if there is no C compiler.
    """

    def run(self) -> None:
        """Build, and inspect what was built before the wheel is written."""
        if os.environ.get("DISTCLIP_PURE") == "1":
            self.distribution.ext_modules = []
        build_lib = Path(self.get_finalized_command("build").build_lib)
        # An earlier build may have left a kernel.
        for kernel in build_lib.rglob("_native.*"):
            kernel.unlink()
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not any(build_lib.rglob("_native.*"))
        if self.root_is_pure:
            # Otherwise the files would be in the wheel's folder for one platform.
            self.distribution.ext_modules = []
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag (Python, ABI, platform)."""
        platform = super().get_tag()[2]
        return "py3", "none", "any" if self.root_is_pure else platform


class BuildSource(sdist):
    """Add the documentation, the tests and the training job to the sdist."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, and all files of the folders except generated ones."""
        for folder in _FOLDERS:
            paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
            files += [str(path) for path in paths if "__pycache__" not in path.parts and str(path) not in files]
        super().make_release_tree(base_dir, files)
        if (epoch := os.environ.get("SOURCE_DATE_EPOCH")) is not None:
            for path in (Path(base_dir), *Path(base_dir).rglob("*")):
                os.utime(path, (int(epoch), int(epoch)))

    def make_archive(self, base_name: str, format: str, *args: Any, **options: Any) -> str:
        """Write the archive, with the given time in its header."""
        path = str(super().make_archive(base_name, format, *args, **{**options, "owner": "root", "group": "root"}))
        if (epoch := os.environ.get("SOURCE_DATE_EPOCH")) is not None and format == "gztar":
            Path(path).write_bytes(gzip.compress(gzip.decompress(Path(path).read_bytes()), mtime=int(epoch)))
        return path
