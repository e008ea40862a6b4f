"""PreviousBatchMVR at B = 512 (MUON-MVR's MVR3): compares with the previous batch at these weights. Two gradients a step."""

optimizer = "previous_batch"
