"""The demo: one task of each kind sent through a running gateway."""
