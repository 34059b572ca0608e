"""What no family owns: a transformer's parts, how it is cut over ranks, and what it costs."""
