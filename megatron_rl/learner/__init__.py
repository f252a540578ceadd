"""The learner: Megatron-Core models, their log-probs, their optimizer steps, their weights and
checkpoints.
"""
