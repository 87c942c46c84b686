"""What crosses the scheduler's channel beside SGLang's own requests.

All are pickled, as SGLang's are. A client, as our images server, sends `GenerateRequest` over a
DEALER socket, any number at a time. Each is answered by an `Accepted`, any number of
`ProgressUpdate` if it asked for progress, and a last `Generated`; one that is refused by that last
one alone. `Cancel` has no answer: who sends it has stopped listening. Everything else is wrapped in
`ControlRequest`, answered by `ControlReply`. A client that imports SGLang may also send
`GetStatistics` as it is, answered by an ``OutputBatch`` with the reply in ``output``.
"""

import zlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from krea2_srt.errors import foreign
from krea2_srt.request import AdapterChoice, AdapterUse, ImageRequest, RequestLimits, inner_name

_CARRIED = " ".join(
    field.name
    for one in (ImageRequest, RequestLimits, AdapterChoice, AdapterUse)
    for field in fields(one)
)

VERSION = f"7-{zlib.crc32(_CARRIED.encode()):08x}"
"""Version of these messages, and of the fields of what they carry: one that the other side does not
know would be ignored in silence. A server and its engines are of one version: a scheduler refuses a
message of another by name, and cannot even read one of a class that it does not know.
"""


@dataclass(frozen=True)
class Cancel:
    """End the requests of an id before their next step.

    No reply. Where another client waits for such a request, it gets its `Generated`, cancelled.
    """

    request_id: str
    version: str = VERSION


def preview_steps(total: int, previews: int) -> frozenset[int]:
    """After which of a sequence's steps to send a preview: evenly spread, never after the last."""
    previews = min(previews, total - 1)
    return frozenset(
        step for step in (round(total * i / (previews + 1)) for i in range(1, previews + 1))
    )


@dataclass(frozen=True)
class GetStatistics:
    """Reply: the engine's statistics, a dict."""

    version: str = VERSION


@dataclass(frozen=True)
class GenerateRequest:
    """Generate the images of a request.

    Attributes:
        request_id: unique among those of this client; names it in `Cancel`.
        image: with the number of images, and without adapters.
        output_format: ``png``, ``jpeg`` or ``webp``.
        quality: of JPEG and WebP, 0 to 100.
        priority: see `krea2_srt.engine.policy`.
        deadline_s: seconds from now after which nobody waits any more.
        progress: whether to send `ProgressUpdate`.
        previews: how many pictures on the way to send of each image, evenly spread.
        infotext_model: what the model is called in the text that each file gets, see
            `krea2_srt.infotext`; where it is empty, files get none.
        adapters: which it is generated with, by their names; each name once.

    It holds no lists, tuples or dicts: SGLang makes those anew in what its scheduler receives,
    which a frozen dataclass does not let it do.
    """

    request_id: str
    image: ImageRequest
    output_format: str = "png"
    quality: int = 100
    priority: int = 0
    deadline_s: float | None = None
    progress: bool = False
    previews: int = 0
    infotext_model: str = ""
    adapters: frozenset[AdapterChoice] = frozenset()
    version: str = VERSION


@dataclass(frozen=True)
class Accepted:
    """The request is in the engine."""

    request_id: str
    version: str = VERSION


@dataclass(frozen=True)
class Generated:
    """How a `GenerateRequest` ended.

    Attributes:
        images: encoded, in the order of their seeds; none if there is an error.
        text_tokens: that the model has read: the prompt's, the negative prompt's where it is
            used, and five of the template for each.
        image_tokens: latent tokens of all images.
        prompt_cut: whether a prompt had more tokens than the model reads.
        stage_ms: milliseconds in each stage: queue, encode, denoise, decode.
        adapters: which they were generated with, by name.
        error: why there are no images.
    """

    request_id: str
    images: tuple[bytes, ...] = ()
    text_tokens: int = 0
    image_tokens: int = 0
    prompt_cut: bool = False
    stage_ms: dict[str, float] = field(default_factory=dict)
    adapters: tuple[AdapterUse, ...] = ()
    error: "EngineError | None" = None
    version: str = VERSION


@dataclass(frozen=True)
class ModelInfo:
    """What is served.

    Attributes:
        path: folder or repo id.
        distilled: Turbo (True) or Raw (False).
        default_steps, default_guidance: the checkpoint's own.
        limits: of requests.
        device, dtype, attention: how it runs.
        trained_side: pixels of the longest side that the checkpoint was trained on.
        adapters: whether there is a folder of adapters that requests may name.
    """

    path: str
    distilled: bool
    default_steps: int
    default_guidance: float
    limits: RequestLimits
    device: str
    dtype: str
    attention: str
    trained_side: int = 2048
    adapters: bool = False


@dataclass(frozen=True)
class GetModel:
    """Reply: a `ModelInfo`."""

    version: str = VERSION


@dataclass(frozen=True)
class GetAdapters:
    """Reply: an `AdapterInfo` of each adapter that is served, sorted by name."""

    version: str = VERSION


@dataclass(frozen=True)
class LoadAdapter:
    """Read an adapter now, and serve it.

    Reply: its `AdapterInfo`, or why it cannot be.

    Attributes:
        name: under which it is served.
        path: of its file or folder, within the folder of adapters; "" is where its name says.
    """

    name: str
    path: str = ""
    version: str = VERSION


@dataclass(frozen=True)
class UnloadAdapter:
    """Serve an adapter no more, until it is loaded again. What is in the engine goes on.

    Reply: None, or that there is none of this name.
    """

    name: str
    version: str = VERSION


@dataclass(frozen=True)
class SetAdapterNames:
    """Serve adapters under these names beside those of their files, and some no more: all that
    `LoadAdapter` and `UnloadAdapter` have come to elsewhere. Nothing is read.

    Reply: None.

    Attributes:
        aliases: names, each with the name of its file in the folder.
        unloaded: names of files that are not served.
    """

    aliases: frozenset[tuple[str, str]] = frozenset()
    unloaded: frozenset[str] = frozenset()
    version: str = VERSION

    def after_load(self, name: str, path: str) -> "SetAdapterNames":
        """These after a `LoadAdapter`."""
        inner = inner_name(name, path)
        aliases = frozenset(alias for alias in self.aliases if alias[0] != name)
        if inner != name:
            return replace(self, aliases=aliases | {(name, inner)})
        return replace(self, aliases=aliases, unloaded=self.unloaded - {name})

    def after_unload(self, name: str) -> "SetAdapterNames":
        """These after an `UnloadAdapter`."""
        aliases = frozenset(alias for alias in self.aliases if alias[0] != name)
        return replace(self, aliases=aliases, unloaded=self.unloaded | {name})


Command = GetStatistics | GetModel | GetAdapters | LoadAdapter | UnloadAdapter | SetAdapterNames


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that is served.

    Attributes:
        name: under which.
        title, trigger_words, default_scale: see `krea2_srt.lora.card.AdapterCard`.
        where: ``device``, ``host`` or ``disk``.
        bytes: of its files.
        digest: SHA-256 of its files; "" as long as they have not been read.
        rank: the largest of its factors; 0 as long as they have not been read.
        error: why it cannot be used; "" where it can, as far as is known.
    """

    name: str
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    default_scale: float = 1.0
    where: str = "disk"
    bytes: int = 0
    digest: str = ""
    rank: int = 0
    error: str = ""


@dataclass(frozen=True)
class ControlRequest:
    """A command of a client that does not import SGLang.

    Attributes:
        control_id: comes back with the reply.
        command: what to do.
    """

    control_id: str
    command: Command
    version: str = VERSION


@dataclass(frozen=True)
class ControlReply:
    """The reply to a `ControlRequest`.

    Attributes:
        output: what the command's own docstring promises.
        error: why there is none; an `EngineError` where a client is to be told.
    """

    control_id: str
    output: Any = None
    error: "str | EngineError | None" = None
    version: str = VERSION


@dataclass(frozen=True)
class ProgressUpdate:
    """A step is done. Where a preview is due, a second message has it, a little later.

    Attributes:
        sequence: index of the image in its request.
        step, total: steps done, of how many.
        preview: uint8 [height, width, 3], at most 256 x 256, of that step.
    """

    request_id: str
    sequence: int
    step: int
    total: int
    preview: np.ndarray[Any, Any] | None = None
    version: str = VERSION


@dataclass(frozen=True)
class EngineError:
    """Why a request was refused or failed.

    Attributes:
        code: of the error's class; see `krea2_srt.errors.kind_of`.
        message: for a person.
        field: of the `ImageRequest` or `GenerateRequest` that is wrong; of a deadline that has
            passed, ``deadline_s``.
        retry_after_s: when the queue is expected to have room.
    """

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None
    version: str = VERSION

    @classmethod
    def of(cls, error: Exception) -> "EngineError":
        """What a client is told of an error."""
        ours = foreign(error)
        return cls(ours.code, str(ours), ours.field, ours.retry_after_s)
