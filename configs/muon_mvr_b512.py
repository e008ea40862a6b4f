"""MuonMVR of "On the Convergence of Muon and Beyond" at B = 512, with its README's settings; AdamW for the embedding.

`--compare-with previous_batch` and `previous_weights` are its two exact modes, at two gradients a step.
"""

optimizer = "muon_mvr"
lr = 3e-3
momentum = 0.95
gamma = 0.025
