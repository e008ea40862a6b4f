"""The paper's Muon-MVR (Algorithm 1, theorem 1): MVR-1 with the spectral norm and decoupled decay.

The theorem's alpha = 1 - momentum = 0.1 exceeds its beta = lr * weight_decay = 3.6e-4, as it requires. With weight_decay = 1
the weights stay in the ball of the radius, so its eta = lr * radius is at least beta times their norm.
"""

optimizer = "mvr1"
weight_decay = 1.0
