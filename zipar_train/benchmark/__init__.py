"""Benchmarks of generation and training on this machine, compared with the roofline and other decoders."""
