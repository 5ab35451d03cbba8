"""Code for deployment: image health check, chart, dashboards, reference of settings."""
