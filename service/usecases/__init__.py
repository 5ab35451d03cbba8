"""What the gateway does, written over ports: no HTTP, no Redis."""
