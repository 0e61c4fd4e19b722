"""``python -m maskcast``."""

from maskcast import main

main()
