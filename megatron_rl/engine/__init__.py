"""vLLM servers: starting and supervising them, sampling and scoring over HTTP, and the HTTP calls
that publish weights to them.
"""
