"""PreviousBatchMVR at B = 512 (MUON-MVR's MVR3). It compares with the previous batch at these weights: two gradients a step."""

optimizer = "previous_batch"
