"""HTTP clients: the vendor, its files, and tenants' webhooks."""
