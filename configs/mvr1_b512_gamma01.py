"""MVR-1 with a tenth of the correction (gamma = 0.1) at the recipe's momentum. gamma < 1 is MARS's, not the paper's."""

optimizer = "mvr1"
momentum = 0.9
gamma = 0.1
