"""The commands for runs. Run one with `python -m scripts.NAME`."""

import common.errors  # noqa: F401  # first, so that Ctrl-C while torch is imported is one line
