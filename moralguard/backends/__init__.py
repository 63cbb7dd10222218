"""What a model offers to the guard: forward passes, caches, the head, its capabilities."""
