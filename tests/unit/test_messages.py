"""What crosses the scheduler's channel, as SGLang takes it."""

import dataclasses
import typing

from krea2_srt.messages import Cancel, ControlRequest, GenerateRequest
from krea2_srt.request import ImageRequest


def test_messages_to_the_scheduler_hold_no_containers():
    """It makes each anew, and puts it back into the message, which is frozen."""
    for message in (GenerateRequest, ImageRequest, Cancel, ControlRequest):
        hints = typing.get_type_hints(message)
        for field in dataclasses.fields(message):
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            assert not {list, tuple, dict} & {typing.get_origin(kind) or kind for kind in kinds}, (
                f"{message.__name__}.{field.name}"
            )
