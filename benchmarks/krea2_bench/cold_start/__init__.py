"""How long an engine takes from nothing to ready, where its weights come from a slow disk."""
