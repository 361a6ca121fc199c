"""What is known of the processor."""

from __future__ import annotations

import pathlib

from attn_ext.benchmark.machine import processor
from attn_ext.processor import family, properties, vendor

TWO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
power management:
flags\t\t: fpu vme

processor\t: 1
vendor_id\t: GenuineIntel
"""


def test_properties_are_the_first_processors(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(TWO)
    assert properties(str(file)) == {
        "processor": "0",
        "vendor_id": "AuthenticAMD",
        "cpu family": "25",
        "model": "17",
        "model name": "AMD EPYC",
        "power management": "",
        "flags": "fpu vme",
    }


def test_nothing_is_known_without_the_file(tmp_path: pathlib.Path) -> None:
    assert properties(str(tmp_path / "missing")) == {}


def test_this_processor() -> None:
    text = pathlib.Path("/proc/cpuinfo").read_text()
    assert vendor() in text
    assert bool(vendor()) == ("vendor_id" in text)
    assert family() in processor()
