"""Where things run: local services and launchers."""
