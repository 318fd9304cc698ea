"""Where data comes from and what DVC knows of it."""
