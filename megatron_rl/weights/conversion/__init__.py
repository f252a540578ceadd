"""Conversion between Hugging Face checkpoints and Megatron's distributed checkpoints, tensor by
tensor, without Megatron and without process groups.
"""
