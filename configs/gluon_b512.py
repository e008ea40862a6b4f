"""Gluon at B = 512: the baseline of figures 1, 3 and 4. It is our defaults, so nothing is left to say."""
