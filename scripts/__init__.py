"""What is done with runs: each is run as `python -m scripts.NAME`."""

import common.errors  # noqa: F401  # first, so that Ctrl-C while torch is imported is one line
