"""Tokens on disk: the shard format, the loader, and the sources of shards (FineWeb, text files, the embedded text)."""

import common.errors  # noqa: F401  # first, so that Ctrl-C while torch is imported is one line
