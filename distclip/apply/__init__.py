"""Write an outcome: scale or clamp gradients in place, step optimizers, inform a GradScaler."""
