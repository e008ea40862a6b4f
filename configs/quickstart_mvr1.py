"""Gluon-MVR-1 on the byte model of quickstart_gluon, with the momentum of mvr1_b512."""

from quickstart_gluon import *  # noqa: F403

optimizer = "mvr1"
momentum = 0.1
