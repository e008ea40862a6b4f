"""The name of this machine's processor."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's model, as Linux names it; on other systems, as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
