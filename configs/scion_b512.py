"""Constrained Scion at B = 512: Gluon with weight decay 1, which keeps the weights in the ball, and a linear warm-down."""

weight_decay = 1.0
schedule = "linear"
