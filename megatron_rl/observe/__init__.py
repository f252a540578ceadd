"""What a run shows and keeps: metrics, TensorBoard, metrics.jsonl, the console."""
