"""What a network withstands, and whether that can be believed."""
