"""Operations of the gateway over ports: no HTTP, no Redis."""
