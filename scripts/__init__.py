"""The commands for runs. Run one with `python -m scripts.NAME`."""
