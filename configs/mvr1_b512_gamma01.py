"""MVR-1 with a tenth of the correction (gamma = 0.1) at the recipe's momentum. Not the paper's: gamma < 1 is MARS's scale."""

optimizer = "mvr1"
momentum = 0.9
gamma = 0.1
