"""Lets a new virtual environment use the torch that this Python has:  python own_torch.py VENV CONSTRAINTS

Where this Python has a torch of at least 2.11, the environment is pointed to the folder that it lies in, and the pins
of torch and of the triton that comes with it are left out of VENV/constraints.txt; else all pins of CONSTRAINTS are
taken over, and pip installs the pinned torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

LEAST = (2, 11)


def torch_folder() -> Path | None:
    """The folder on this Python's path that holds a torch which is new enough; None where there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
    if numbers is None or (int(numbers[1]), int(numbers[2])) < LEAST:
        return None
    return Path(found.origin).resolve().parent.parent


def main(venv: Path, constraints: Path) -> None:
    """Writes VENV/constraints.txt and, where there is a torch to be used, a path file."""
    lines = constraints.read_text(encoding="utf-8").splitlines(keepends=True)
    folder = torch_folder()
    for packages in [*venv.glob("lib/python3*/site-packages"), *venv.glob("Lib/site-packages")]:
        path_file = packages / "own_torch.pth"
        path_file.unlink(missing_ok=True)
        if folder is not None and folder != packages.resolve():
            path_file.write_text(f"{folder}\n", encoding="utf-8")
            lines = [line for line in lines if not line.startswith(("torch==", "triton=="))]
            print(f"using the torch in {folder}")
    (venv / "constraints.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
