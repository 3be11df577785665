"""What only developers of the checkout run; none of it is in a wheel."""
