"""Log-probs of chosen tokens over a vocabulary that may be sharded over tensor-parallel ranks."""
