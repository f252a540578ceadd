"""Runs several training runs and compares them; used by tools/, not by a training run."""
