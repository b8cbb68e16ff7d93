"""Images to shards of codes, and shards to batches: sources, decoding, classes, tokenizing, importing, loading."""
