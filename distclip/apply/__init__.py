"""Write a decision into gradients, optimizers and a GradScaler."""
