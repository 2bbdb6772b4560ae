"""Print the requirements of distclip with some extras, one per line: `python docker/requirements.py train,mpi`.

The images install the requirements before the source is copied, so that a change of the source does not reinstall them.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def requirements(extras: str) -> Iterator[str]:
    """Yield the requirements of extras, and of the extras that these include."""
    for extra in extras.split(","):
        for requirement in PROJECT["optional-dependencies"][extra]:
            if inner := re.fullmatch(rf"{PROJECT['name']}\[(.+)\]", requirement):
                yield from requirements(inner[1])
            else:
                yield requirement


print(*PROJECT["dependencies"], *requirements(sys.argv[1]), sep="\n")
