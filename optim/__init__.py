"""LMO optimizers over norm balls with momentum variance reduction, as ordinary `torch.optim.Optimizer`s.

This package imports torch alone, so that it can be taken elsewhere.
"""

from optim.gluon import Gluon
from optim.muon_mvr import MuonMVR
from optim.mvr import GluonMVR1, GluonMVR2, GluonMVR3

__all__ = ["Gluon", "GluonMVR1", "GluonMVR2", "GluonMVR3", "MuonMVR"]
