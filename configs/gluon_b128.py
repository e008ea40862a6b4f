"""Gluon at B = 128: the baseline of figure 2. Its length is not
stated: `--steps 20400` sees the tokens of a run at B = 512."""

batch_size = 128
