"""LlamaGen: the transformers model, its rotary embedding, and the conversion of published files."""
