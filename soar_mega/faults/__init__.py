"""What ends a run that cannot go on, and says why: signals, agreement between ranks, the watchdog and its report."""
