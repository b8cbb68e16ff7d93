"""Model families: what a prompt is, the network, weights in the layouts that people hold, and image tokenizers."""
