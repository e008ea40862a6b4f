"""Gluon at B = 512: the baseline of figures 1, 3 and 4, and our defaults, so that nothing is left to say."""
