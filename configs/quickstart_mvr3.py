"""Gluon-MVR-3 on the byte model of quickstart_gluon, with the momentum of mvr3_b512."""

from quickstart_gluon import *  # noqa: F403

optimizer = "mvr3"
momentum = 0.2
