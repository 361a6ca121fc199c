"""The repository keeps its promises: every path and name that its documents mention exists."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess

import pytest

import attn_ext

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/multihead_attention.md", "examples/README.md"]  # fmt: skip
PATH = re.compile(
    r"(?<![\w./-])((?:csrc|attn_ext|tests|bench|docs|examples|\.ci)/[\w./-]*[\w]|[\w-]+\.(?:md|toml|py|txt)|\.ci/run)(?![\w*<])"
)
MADE_LATER = {"demo/loss_curves.png"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    folders = [ROOT, ROOT / "attn_ext", ROOT / document.rpartition("/")[0]]
    for path in set(PATH.findall(text)) - MADE_LATER:
        assert any((folder / path).exists() for folder in folders), path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"\bmake ([a-z-]+)\b(?= *[`#\n;.,:])", (ROOT / document).read_text()):
        assert target in targets, target


def test_every_public_name_is_in_readme_and_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in attn_ext.__all__:
        assert name.startswith("__") or name in readme, name
        value = getattr(attn_ext, name)
        assert not callable(value) or value.__doc__, name


def test_every_source_is_built() -> None:
    setup = (ROOT / "setup.py").read_text()
    for path in (ROOT / "csrc").rglob("*.c*"):
        if path.suffix != ".cuh":
            assert str(path.relative_to(ROOT)) in setup, path


def test_every_file_of_the_build_is_packed() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text().split()
    for path in (ROOT / "csrc").rglob("*.*"):
        assert f"*{path.suffix}" in manifest, path
    assert "setup_cuda.py" in manifest


def test_nothing_unfinished_is_tracked() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"} and path != pathlib.Path(__file__):
            assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name
)
def test_no_file_runs_the_tests_of_another(path: pathlib.Path) -> None:
    """pytest takes a test that a file imports for one of its own."""
    imports = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.ImportFrom)]
    assert [x.name for node in imports for x in node.names if x.name.startswith("test_")] == []
