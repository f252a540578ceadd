"""Computes the loss from rewards and log-probs: torch functions without collectives, config or
logging.
"""
