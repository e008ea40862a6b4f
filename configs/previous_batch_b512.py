"""Variance reduction by the previous batch at these weights at B = 512: MUON-MVR's MVR3, two gradients a step."""

optimizer = "previous_batch"
