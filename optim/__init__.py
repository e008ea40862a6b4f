"""LMO optimizers over norm balls with momentum variance reduction, as ordinary `torch.optim.Optimizer`s.

This package imports torch alone, and itself relatively, so that it can be taken elsewhere under another name.
"""

from .gluon import Gluon
from .muon_mvr import MuonMVR
from .mvr import GluonMVR1, GluonMVR2, GluonMVR3, PreviousBatchMVR, SingleBatchMVR

# Every optimizer of this package by its short name.
BY_NAME: dict[str, type[Gluon]] = {
    "gluon": Gluon,
    "mvr1": GluonMVR1,
    "mvr2": GluonMVR2,
    "mvr3": GluonMVR3,
    "single_batch": SingleBatchMVR,
    "previous_batch": PreviousBatchMVR,
    "muon_mvr": MuonMVR,
}

__all__ = ["BY_NAME", "Gluon", "GluonMVR1", "GluonMVR2", "GluonMVR3", "MuonMVR", "PreviousBatchMVR", "SingleBatchMVR"]
