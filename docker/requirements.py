"""What distclip with these extras needs, a line each: `python docker/requirements.py train,mpi`.

The images install it before the source is copied, so that a change of the source installs nothing anew.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def needed(extras: str) -> Iterator[str]:
    for extra in extras.split(","):
        for requirement in PROJECT["optional-dependencies"][extra]:
            if inner := re.fullmatch(rf"{PROJECT['name']}\[(.+)\]", requirement):
                yield from needed(inner[1])
            else:
                yield requirement


print(*PROJECT["dependencies"], *needed(sys.argv[1]), sep="\n")
