"""The built-in discriminator: P(v|y), the probability that a text keeps a value stated at test time."""
