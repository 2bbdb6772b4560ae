"""From the lines that a recorder wrote to what follows from them."""
