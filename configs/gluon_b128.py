"""Gluon at B = 128: the baseline of figure 2, whose caption does not give its length.

`--steps 20400` sees the tokens of a run at B = 512.
"""

batch_size = 128
