"""Regenerates the native modules' stubs, or checks that they are up to date (--check).

A module that was not built keeps the stub that it has.
"""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
import tempfile

PACKAGE = pathlib.Path(__file__).parent.parent / "attn_ext"
MODULES = ("_cpu", "_cuda")


def generated(module: str) -> str:
    """What pybind11-stubgen writes for a module of attn_ext, in the house's format."""
    stub = f"{module}.pyi"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", f"attn_ext.{module}", "-o", folder],
            check=True,
            capture_output=True,
        )
        text = (pathlib.Path(folder) / "attn_ext" / stub).read_text()
        for command in (["check", "--fix", "--quiet"], ["format", "--quiet"]):
            text = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--stdin-filename", PACKAGE / stub, "-"],
                input=text,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        return text


def main() -> None:
    for module in MODULES:
        if importlib.util.find_spec(f"attn_ext.{module}") is None:
            print(f"attn_ext.{module} is not built: its stub is left alone", file=sys.stderr)
            continue
        stub, text = PACKAGE / f"{module}.pyi", generated(module)
        if "--check" not in sys.argv:
            stub.write_text(text)
        elif stub.read_text() != text:
            sys.exit(f"{stub} is out of date: run `make stubs`")


if __name__ == "__main__":
    main()
