"""MVR-1 with a tenth of the correction, at the recipe's momentum: ours, not the paper's (gamma < 1 is MARS's scale)."""

optimizer = "mvr1"
momentum = 0.9
gamma = 0.1
