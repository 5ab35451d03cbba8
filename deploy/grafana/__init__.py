"""Generates the Grafana dashboards.

    python -m deploy.grafana

Every dashboard has a variable for its data source, and works with and without namespaces.
"""
