"Print the requirements of the core and of the extras named on the command line, one a line; extras of extras are followed."

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]


def requirements(extras: list[str]) -> list[str]:
    found: list[str] = []
    for extra in extras:
        for r in project["optional-dependencies"][extra]:
            own = re.fullmatch(r"waystation\[([\w,]+)\]", r)
            found += requirements(own[1].split(",")) if own else [r]
    return found


if __name__ == "__main__":
    print(*dict.fromkeys(r.replace(" ", "") for r in project["dependencies"] + requirements(sys.argv[1:])), sep="\n")
