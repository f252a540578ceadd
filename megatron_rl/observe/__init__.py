"""Records and displays a run: metrics, TensorBoard, metrics.jsonl, the console."""
