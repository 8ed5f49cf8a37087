"""Token shards: written in chunks, merged, read."""
