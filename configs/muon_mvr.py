"""The paper's Muon-MVR (theorem 1): exact MVR (gamma = 1), the spectral norm for every matrix but the embedding, and
decoupled decay. The theorem's α = 1 - momentum = 0.1 exceeds its β = lr * weight_decay = 3.6e-4, as it asks, and with
weight_decay = 1 the weights stay in the ball of the radius: its η = lr * radius is at least β times their norm."""

optimizer = "mvr2"
gamma = 1.0
weight_decay = 1.0
