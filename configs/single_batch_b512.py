"""SingleBatchMVR at B = 512 (MUON-MVR's MVR1): compares with the last step's gradient. One gradient a step."""

optimizer = "single_batch"
