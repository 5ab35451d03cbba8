"""Rules and value types, without I/O and without a clock."""
