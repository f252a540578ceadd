"""Scores responses with verifiers in worker processes. Nothing in this package imports torch."""
