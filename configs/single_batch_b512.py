"""Variance reduction by the last step's gradient at B = 512: MUON-MVR's MVR1, one gradient a step."""

optimizer = "single_batch"
