"""Gluon-MVR-1 at B = 128 (figure 2)."""

optimizer = "mvr1"
batch_size = 128
