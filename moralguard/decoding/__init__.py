"""The step between logits and token: auxiliary passes, rectification, slots of running requests, the own decode loop."""
