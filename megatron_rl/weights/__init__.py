"""Weights as names and shards: what Megatron calls a tensor, what Hugging Face calls it, and how it
is cut.
"""
