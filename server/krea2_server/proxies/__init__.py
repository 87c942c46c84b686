"""Proxies in front of this server: what they say of a request, and which of it is believed."""
