"""Gluon-MVR-1 at B = 512 (figure 1): STORM's momentum, gamma = 1, two gradients a step.

The caption gives no momentum. 0.1 trained best of 0.9, 0.5, 0.2 and 0.1 on the small model: with gamma = 1 the noise of the
correction lives for 1 / (1 - momentum) steps, and at the recipe's 0.9 it drowns the gradient.
"""

optimizer = "mvr1"
momentum = 0.1
