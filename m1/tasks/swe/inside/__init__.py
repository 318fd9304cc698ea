"""Files that are sent into the sandbox and run there; nothing on the host imports them."""
