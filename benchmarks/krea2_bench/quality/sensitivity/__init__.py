"""What each matrix of the blocks loses in 8 bits, and which should stay in 16."""
