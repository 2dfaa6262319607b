"""What one unit of work of each stage does."""
