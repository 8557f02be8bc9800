"""``python -m smolquant``."""

from smolquant.cli import main

main()
