"""Prompts in, packed micro-batches out; no process group, no model, no engine."""
