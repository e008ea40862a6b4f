"""Our studies: each is run as `python -m experiments.NAME`, and results/ holds what they found."""
