"""Gluon-MVR-2 at B = 512 (figure 3): momentum over a variance-reduced gradient, two gradients a step.

The caption gives no q; 0.5 is figure 4's. On the small model 0.5 trained better than 0.8 at a small lr, and worse at a large
one.
"""

optimizer = "mvr2"
q = 0.5
