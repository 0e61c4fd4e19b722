"""Run the command: ``python -m maskcast``."""

from maskcast import main

main()
