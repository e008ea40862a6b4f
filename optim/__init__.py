"""LMO optimizers over norm balls with momentum variance reduction, as ordinary `torch.optim.Optimizer`s.

This package imports torch alone, and itself relatively, so that it can be taken elsewhere under another name.
"""

from .gluon import Gluon
from .muon_mvr import MuonMVR
from .mvr import GluonMVR1, GluonMVR2, GluonMVR3, PreviousBatchMVR, SingleBatchMVR

__all__ = ["Gluon", "GluonMVR1", "GluonMVR2", "GluonMVR3", "MuonMVR", "PreviousBatchMVR", "SingleBatchMVR"]
