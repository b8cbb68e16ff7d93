"""Model families: prompts, networks, weights in published and own layouts, and image tokenizers."""
