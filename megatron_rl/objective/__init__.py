"""Rewards and log-probs to a loss: torch functions without collectives, config or logging."""
