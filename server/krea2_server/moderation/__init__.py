"""Content moderation: prompts are checked before generation, images after it."""
