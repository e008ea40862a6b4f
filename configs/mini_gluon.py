"""Gluon on the smallest model (0.2 M parameters), the mini scale of experiments/. 1,000 updates take a minute of one core."""

from quickstart_gluon import *  # noqa: F403

seq_len = 128
n_head = 1
d_model = 64

lr = 2.5e-4
steps = 1000

val_every = 50
val_tokens = 16384
log_every = 50
checkpoint_every = 500
