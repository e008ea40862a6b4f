"""Gluon at B = 512: the baseline of figures 1, 3 and 4. These are the trainer's defaults."""
