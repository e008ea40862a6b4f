"""Tokens on disk: the shard format, the loader, and the sources of shards (FineWeb, text files, the embedded text)."""
