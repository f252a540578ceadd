"""Responses in, scores out; verifiers run in worker processes. Nothing here imports torch."""
