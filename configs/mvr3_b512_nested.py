"""Figure 4, reading (c), nested: the gradient is first cleaned by exact variance reduction (q = 0.5), then averaged
with the momentum α = 0.8."""

optimizer = "mvr2"
momentum = 0.8
inner = 0.5
