"""Gluon-MVR-1 at B = 512 (figure 1): one gradient per step, compared with the step before."""

optimizer = "mvr1"
