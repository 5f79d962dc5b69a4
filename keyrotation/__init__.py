"""Signing key rotation: everything that is true without Prefect. The conductor lives in `flows` and `tasks`."""
