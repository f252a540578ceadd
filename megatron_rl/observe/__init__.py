"""What a run shows and records: metrics, TensorBoard, metrics.jsonl, the console."""
