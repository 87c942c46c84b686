"""How near the pictures of several configurations come to each other, and to their prompts."""
