"""How long the engine's threads spin when they wait: what it costs, alone and beside others."""
