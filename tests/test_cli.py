"""The command `attn-ext`."""

from __future__ import annotations

import pytest
import torch

import attn_ext
from attn_ext import cli
from attn_ext.backends import cpu


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info"])
    text = capsys.readouterr().out
    assert f"attn_ext      {attn_ext.__version__}" in text
    assert f"torch         {torch.__version__}" in text
    assert f"in use        {cpu.capability}" in text
    assert "cpu, bfloat16:\n  cpu would run\n    not cuda: " in text
    assert "    not reference: 'cpu' is preferred\n" in text


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "required: command" in capsys.readouterr().err
