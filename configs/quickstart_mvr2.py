"""Gluon-MVR-2 on the byte model of quickstart_gluon."""

from quickstart_gluon import *  # noqa: F403

optimizer = "mvr2"
