"""Gluon-MVR-3 of figure 4 if alpha = 0.8 is the weight of the past: the momentum is 0.8."""

optimizer = "mvr3"
momentum = 0.8
q = 0.5
