"""What the gateway decides, without I/O and without a clock of its own."""
