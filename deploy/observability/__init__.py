"""Dashboards, alerts and the configuration of Prometheus, Alertmanager and Grafana."""
