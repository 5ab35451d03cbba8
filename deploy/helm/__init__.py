"""The Helm chart, and code that renders it with Helm, without a cluster."""
