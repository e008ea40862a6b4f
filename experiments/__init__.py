"""The studies. Run one with `python -m experiments.NAME`; results/ holds what they found."""
