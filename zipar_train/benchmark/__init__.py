"""How fast this machine generates and trains, beside the roofline and other decoders."""
