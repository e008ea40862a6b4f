"""Gluon-MVR-1 at B = 128 (figure 2). The momentum is chosen as in mvr1_b512."""

optimizer = "mvr1"
momentum = 0.1
batch_size = 128
