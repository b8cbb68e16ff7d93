"""Image tokenizers, which encode pixels to codes and decode codes to pixels."""
