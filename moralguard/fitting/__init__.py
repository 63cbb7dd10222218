"""Fitting: what labelled text is turned into."""
