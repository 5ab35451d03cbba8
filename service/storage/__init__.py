"""The state of the gateway, on Redis."""
