"""RL post-training with Megatron-Core learners and vLLM rollout engines that do not agree on
probabilities.
"""

__version__ = "0.1.0"
