"""What a pattern does to a sequence: lint, reach, and pictures."""
