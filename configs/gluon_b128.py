"""Gluon at B = 128: the baseline of figure 2, whose caption does not give its length.

`--steps 20400` reads as many tokens as a run at B = 512.
"""

batch_size = 128
