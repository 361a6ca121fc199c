"""Which processor this is, where speed depends on it."""

from __future__ import annotations

import functools
import itertools
import re


@functools.cache
def properties(file: str = "/proc/cpuinfo") -> dict[str, str]:
    """What Linux says of the first processor, under its names: "vendor_id" and "model name", say.

    Empty where the file can't be read, as on other systems.
    """
    try:
        with open(file, errors="replace") as lines:
            first = "".join(itertools.takewhile(str.strip, lines))
    except OSError:
        return {}
    return dict(re.findall(r"^(\S.*?)\s*:[ \t]*(.*?)\s*$", first, re.M))


def vendor() -> str:
    """As the processor spells it, "AuthenticAMD" or "GenuineIntel"; empty if unknown."""
    return properties().get("vendor_id", "")


def family() -> str:
    """The vendor's number of a generation, 25 for AMD's Zen 3 and 4, 26 for Zen 5; or empty."""
    return properties().get("cpu family", "")
