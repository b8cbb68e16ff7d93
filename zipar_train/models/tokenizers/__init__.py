"""Image tokenizers: pixels to codes and codes to pixels."""
