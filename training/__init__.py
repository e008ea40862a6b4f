"""The parts of a run that an author of an algorithm may skip: configuration, ranks, checkpoints, metrics."""
