"""Power sums of local gradients, and the one all-reduce that adds them up."""
