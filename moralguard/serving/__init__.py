"""The guard in serving stacks. Each stack's adapter is imported by name; none of them is imported here."""
