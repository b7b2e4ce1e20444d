"""Metrics and logs for operators, and what the process asks of its system."""
