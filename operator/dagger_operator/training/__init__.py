"""Labels become the next student: tokens and masks, the DeepSpeed loop, checkpoints, export."""
