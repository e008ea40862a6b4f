"""The parts of a run that you can skip to follow an algorithm: configuration, ranks, checkpoints, metrics."""
