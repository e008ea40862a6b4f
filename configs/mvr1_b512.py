"""Gluon-MVR-1 at B = 512 (figure 1): STORM's momentum, gamma = 1, two gradients a step.

The caption gives no momentum. At the recipe's 0.9 the noise of the correction, which lasts 1 / (1 - momentum) steps, drowns the
gradient. The byte model of quickstart_gluon (lr 1e-3, 120 updates, one seed) ended at 1.863 with 0.5, 1.786 with 0.2, 1.783
with 0.1 and 1.775 with 0.02, which is almost no momentum. 0.1 is the smallest momentum in experiments/figures.py.
"""

optimizer = "mvr1"
momentum = 0.1
