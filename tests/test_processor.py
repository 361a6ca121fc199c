"""What is known of the processor."""

from __future__ import annotations

import pathlib
import platform

import pytest

from attn_ext import processor
from attn_ext.benchmark import machine

TWO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC \N{REGISTERED SIGN}\x20
power management:
flags\t\t: fpu vme

processor\t: 1
vendor_id\t: GenuineIntel
"""
FIRST = {
    "processor": "0",
    "vendor_id": "AuthenticAMD",
    "cpu family": "25",
    "model": "17",
    "model name": "AMD EPYC \N{REGISTERED SIGN}",
    "power management": "",
    "flags": "fpu vme",
}
ARM = {"processor": "0", "BogoMIPS": "243.75", "CPU architecture": "8"}


def test_properties_are_the_first_processors(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(TWO)
    assert processor.properties(str(file)) == FIRST


def test_properties_of_a_file_that_is_no_text(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_bytes(b"model name\t: \xff\xfe\n")
    assert processor.properties(str(file)) == {"model name": "\N{REPLACEMENT CHARACTER}" * 2}


def test_nothing_is_known_without_the_file(tmp_path: pathlib.Path) -> None:
    assert processor.properties(str(tmp_path / "missing")) == {}


@pytest.mark.parametrize(
    ("found", "vendor", "family", "name"),
    [
        (FIRST, "AuthenticAMD", "25", "AMD EPYC \N{REGISTERED SIGN} (family 25, model 17)"),
        (ARM, "", "", platform.processor()),
        ({}, "", "", platform.processor()),
    ],
)
def test_names(
    found: dict[str, str], vendor: str, family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "properties", lambda: found)
    monkeypatch.setattr(machine, "properties", lambda: found)
    assert processor.vendor() == vendor
    assert processor.family() == family
    assert machine.processor() == name
