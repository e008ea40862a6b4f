"""Gluon-MVR-2 at B = 512 (figure 3): the true variance reduction, two gradients of a batch per step."""

optimizer = "mvr2"
