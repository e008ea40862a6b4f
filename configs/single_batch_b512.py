"""SingleBatchMVR at B = 512 (MUON-MVR's MVR1). It compares with the last step's gradient: one gradient a step."""

optimizer = "single_batch"
