"""The gateway as a client of others."""
