"""Provides tokenized prompts according to the settings, without process group, model or engine."""
