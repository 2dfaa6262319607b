"""The editing endpoint."""
