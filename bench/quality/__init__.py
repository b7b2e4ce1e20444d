"""Measures whether what Graft reports is true; run as `python -m bench.quality`."""
