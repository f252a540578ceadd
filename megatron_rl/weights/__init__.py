"""Names and shards of weights: a tensor's names in Megatron and in Hugging Face, and how it is
sharded.
"""
