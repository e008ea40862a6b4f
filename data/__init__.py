"""Tokens on disk: the shard format, the loader, and what makes shards (hub, text files, the embedded text)."""
