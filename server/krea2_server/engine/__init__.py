"""The engine as the server sees it: its processes, their channel, and a client of it."""
