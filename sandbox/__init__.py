"""A real small world on loopback, the other party: identity service, KMS, gateways, Slack, PostgreSQL, Prefect. It shares no code with keyrotation."""
