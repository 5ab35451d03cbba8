"""A stand-in for the upstream: the vendor's API with real image processing, for development and tests.

It is written from the vendor's document alone and shares no code with the gateway's client, so that the two check each
other.
"""
