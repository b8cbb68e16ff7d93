"""What works on this machine, tried; and a remedy for whatever does not."""
