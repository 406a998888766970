"""Speed: the loops that are measured, and the file that tells of them."""
