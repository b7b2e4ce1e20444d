"""Authentication and authorisation: tokens, roles, quotas, TLS and the audit log."""
