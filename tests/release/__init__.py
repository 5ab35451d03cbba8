"""Check of a release: the wheel is built, inspected, and installed outside the checkout (`make release-check`).

The checked wheel is left in dist/ for publication.
"""
