"""Settings in, tokenized prompts out; no process group, no model, no engine."""
