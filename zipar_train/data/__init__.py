"""The data pipeline from images to shards of codes to batches: sources, decoding, labels, tokenizing, loading."""
