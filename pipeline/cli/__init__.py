"""The run-time commands of ``maskcast``, which ``commands.mount`` adds to the program."""
