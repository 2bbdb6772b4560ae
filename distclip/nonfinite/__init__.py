"""What to do about gradients that are not finite."""
