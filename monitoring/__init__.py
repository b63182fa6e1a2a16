"""What Prometheus, Alertmanager and Grafana read, and what generates part of it."""
