"""Speed measurements. Run one with `python -m benchmarks.NAME`."""

import common.errors  # noqa: F401  # first, so that Ctrl-C while torch is imported is one line
