"""The chart for Kubernetes, and what renders it: Helm itself, which needs no cluster for that."""
