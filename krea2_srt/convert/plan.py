"""All files of an output, before any is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from krea2_srt.convert.conversion import Conversion
from krea2_srt.convert.losses import Losses
from krea2_srt.convert.tensor_file import (
    OnBytes,
    TensorFile,
    TensorHeader,
    check_file,
    check_tensors,
    copy_file,
)
from krea2_srt.model.dit_files import open_dit

OnProgress = Callable[[int, int], object]
"""Called with the bytes that are written or read back so far, and with all there will be."""


@dataclass(frozen=True)
class Shard:
    """A safetensors file.

    Attributes:
        name: path within the output; empty where the output is this file.
        conversions: what is in it.
        metadata: what it says of itself.
    """

    name: str
    conversions: tuple[Conversion, ...]
    metadata: Mapping[str, str]

    @property
    def headers(self) -> Iterator[TensorHeader]:
        for conversion in self.conversions:
            yield from conversion.headers

    @property
    def nbytes(self) -> int:
        return sum(conversion.nbytes for conversion in self.conversions)


@dataclass(frozen=True)
class Plan:
    """Files of an output, by their paths within it.

    Attributes:
        transformer: path of the DiT; empty where the output is nothing else.
        shards: weight files that are written anew.
        texts: small files, whole.
        copies: files that are another's, byte for byte.
        left_behind: what the input has beside that.
    """

    transformer: str
    shards: tuple[Shard, ...]
    texts: Mapping[str, str]
    copies: Mapping[str, Path]
    left_behind: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes on the disk, but for headers and small files."""
        tensors = sum(shard.nbytes for shard in self.shards)
        return tensors + sum(source.stat().st_size for source in self.copies.values())

    def write(self, work: Path, on_progress: OnProgress) -> Losses:
        """Write all files, read them back, and compare.

        Args:
            work: the output's path, where nothing is yet.
            on_progress: told again and again.

        Raises:
            CheckpointError: the input cannot be read.
            OSError: the output cannot be written, or the disk has something else afterwards.
        """
        done, total, losses = 0, 2 * self.nbytes, Losses()

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            on_progress(done, total)

        for name in sorted({*self.copies, *self.texts, *(shard.name for shard in self.shards)}):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
        for name, text in self.texts.items():
            (work / name).write_text(text, encoding="utf-8")
        copied = {
            name: copy_file(source, work / name, on_bytes) for name, source in self.copies.items()
        }
        written = {
            shard.name: _write(work / shard.name, shard, losses, on_bytes) for shard in self.shards
        }
        for name, digest in copied.items():
            check_file(work / name, digest, on_bytes)
        for name, digests in written.items():
            check_tensors(work / name, digests, on_bytes)
        with open_dit(work / self.transformer):
            pass  # names, shapes and scales are what a loader wants
        return losses


def shards(conversions: Sequence[Conversion], largest: int) -> list[list[Conversion]]:
    """Conversions in groups of at most so many bytes; one that is larger is alone."""
    groups: list[list[Conversion]] = []
    room = 0
    for conversion in conversions:
        if not groups or conversion.nbytes > room:
            groups.append([])
            room = largest
        groups[-1].append(conversion)
        room -= conversion.nbytes
    return groups


def _write(path: Path, shard: Shard, losses: Losses, on_bytes: OnBytes) -> Mapping[str, bytes]:
    with TensorFile(path, list(shard.headers), shard.metadata, on_bytes) as file:
        for conversion in shard.conversions:
            tensors = conversion.tensors(losses)
            for header, tensor in zip(conversion.headers, tensors, strict=True):
                file.write(header.name, tensor)
    return file.digests
