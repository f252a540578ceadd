"""What a run will need, computed from its settings and the shape of its model alone: whether its
layout is valid, the memory of every GPU, the bytes of a sync and of a checkpoint. `tools/plan.py`
prints it.
"""
