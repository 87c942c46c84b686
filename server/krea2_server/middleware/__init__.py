"""What is around every request, one ASGI class a file."""
