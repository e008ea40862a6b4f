"""The studies. Run one with `python -m experiments.NAME`; results/ holds what they found."""

import common.errors  # noqa: F401  # first, so that Ctrl-C while torch is imported is one line
