"""How near the pictures of two configurations come to each other, and to their prompts."""
