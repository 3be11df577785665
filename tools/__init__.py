"""What developers of this checkout run; ships nothing."""
