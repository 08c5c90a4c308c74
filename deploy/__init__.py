"""Where processes are put together: the command line, the one-machine supervisor."""
