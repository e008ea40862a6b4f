"""Figure 4, reading (b): α = 0.8 is the weight of the new gradient, as in theorem 1, so the momentum is 0.2."""

optimizer = "mvr3"
momentum = 0.2
gamma = 0.5
