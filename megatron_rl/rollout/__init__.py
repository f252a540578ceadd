"""From prompts to rollouts: vLLM server processes, their gate, the HTTP client, and the recording
of every sample.
"""
