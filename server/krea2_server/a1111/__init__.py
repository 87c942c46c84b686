"""AUTOMATIC1111's API, ``/sdapi/v1``, for the front ends that were made for it."""
