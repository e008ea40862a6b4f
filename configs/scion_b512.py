"""Constrained Scion at B = 512: Gluon whose weights stay in the ball of the radius, with a linear warm-down."""

weight_decay = 1.0
schedule = "linear"
