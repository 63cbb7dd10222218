"""What the guard did, token by token."""
