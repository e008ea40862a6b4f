"""Gluon-MVR-3 at B = 512 (figure 4: lr 3.6e-4, α = 0.8, q = 0.5), reading (a): α is the momentum, q is gamma."""

optimizer = "mvr3"
momentum = 0.8
gamma = 0.5
