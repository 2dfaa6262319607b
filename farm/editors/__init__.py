"""Teachers: one file a family, one `Editor` protocol."""
