"""Regenerates attn_ext/_cpu.pyi from the built module, or checks that it is up to date (--check)."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile

STUB = pathlib.Path(__file__).parent.parent / "attn_ext" / "_cpu.pyi"


def generated() -> str:
    """What pybind11-stubgen writes for attn_ext._cpu, in the house's format."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", "attn_ext._cpu", "-o", folder],
            check=True,
            capture_output=True,
        )
        text = (pathlib.Path(folder) / "attn_ext" / "_cpu.pyi").read_text()
        for command in (["check", "--fix", "--quiet"], ["format", "--quiet"]):
            text = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(STUB), "-"],
                input=text,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        return text


def main() -> None:
    text = generated()
    if "--check" not in sys.argv:
        STUB.write_text(text)
    elif STUB.read_text() != text:
        sys.exit(f"{STUB} is out of date: run `make stubs`")


if __name__ == "__main__":
    main()
