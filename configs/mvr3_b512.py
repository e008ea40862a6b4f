"""Gluon-MVR-3 at B = 512 (figure 4: lr 3.6e-4, alpha = 0.8, q = 0.5).

Here alpha is the weight of the new gradient, as in theorem 1, so the momentum is 0.2. `mvr3_b512_beta08` is the other reading.
"""

optimizer = "mvr3"
momentum = 0.2
q = 0.5
