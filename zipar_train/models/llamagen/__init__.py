"""LlamaGen: its network in transformers' form, its rotary table, and the layout of the published files."""
