"""The dashboards of the gateway: what is imported into Grafana is written from here.

    python -m deploy.grafana

Every dashboard chooses its data source by a variable, and works with or without namespaces.
"""
