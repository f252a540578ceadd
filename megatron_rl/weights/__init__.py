"""Names and shards of weights: what Megatron calls a tensor, what Hugging Face calls it, and how it
is cut.
"""
