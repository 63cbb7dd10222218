"""``python -m moralguard``."""

from moralguard.cli import main

main()
