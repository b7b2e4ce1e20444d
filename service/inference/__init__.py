"""Inference: pictures in, probabilities out. Knows no RPC, no jobs, no database."""
