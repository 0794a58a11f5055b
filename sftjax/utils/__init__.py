"""What every room may use: writing files."""
