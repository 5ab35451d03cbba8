"""Traces by OpenTelemetry, which need not be installed: `spans.py` records them, `export.py` sends them."""
