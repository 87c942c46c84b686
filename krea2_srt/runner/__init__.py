"""What turns requests into forwards. Imports torch and transformers, never sglang or diffusers."""
