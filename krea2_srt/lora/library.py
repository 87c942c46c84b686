"""The adapters of a folder, by name, for a process that must not wait for a disk.

Files are looked at and read in threads; a thread of the engine asks for them, and takes in later
what they have found. From there they go to the device when an image begins.
"""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from krea2_srt.errors import AdapterError, RequestError, UnknownAdapterError, foreign
from krea2_srt.lora.card import AdapterCard, read_card
from krea2_srt.lora.files import (
    AdapterFiles,
    NoAdapterError,
    Stamp,
    UnreadableError,
    adapter_names,
    find_adapter,
    unreadable,
)
from krea2_srt.lora.placed import PlacedAdapter
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.lora.reader import read_adapter
from krea2_srt.lora.readers import Readers
from krea2_srt.messages import AdapterInfo, SetAdapterNames
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.request import (
    ADAPTER_NAMES,
    AdapterChoice,
    AdapterUse,
    inner_name,
    is_adapter_name,
)

FRESH_S = 1.0
"""For so long after a look, a file is taken to be as it was."""

_READERS = 16
"""Threads: large files do not hold up a small one."""

_Cards = dict[Path, tuple[tuple[int, int, int], AdapterCard | str]]
"""Cards as they were read, or what is wrong with them, each with what changes with its file."""


@dataclass(frozen=True)
class LibraryAdapter:
    """An adapter as its files were when they were last looked at.

    Attributes:
        path: its file or folder.
        stamp: of the files.
        nbytes: of the files.
        card: what is said of it.
        digest: see `Adapter`.
        rank: the largest of its factors.
        adapter: it, on the host; None where it was read before and has made room, and in what is
            kept of it, or it could never make room.
        error: why it cannot be used, but for its name; the last three say nothing then.
    """

    path: Path
    stamp: Stamp
    nbytes: int
    card: AdapterCard
    digest: str = ""
    rank: int = 0
    adapter: PlacedAdapter | None = None
    error: str = ""

    def info(self, name: str) -> AdapterInfo:
        """What is said of it under a name, wherever it is."""
        card = self.card
        return AdapterInfo(
            name,
            card.title,
            card.trigger_words,
            card.default_scale,
            bytes=self.nbytes,
            digest=self.digest,
            rank=self.rank,
            error=self.error and f"adapter {name}: {self.error}",
        )


class AdapterLibrary:
    """Serves the adapters of a folder.

    Args:
        folder: of them; see `krea2_srt.lora.files.find_adapter`.
        pool: keeps those that were read.
        dit: the model that they are for.
        clock: seconds; only differences count.
    """

    def __init__(
        self,
        folder: Path,
        pool: AdapterPool,
        dit: Krea2DiT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._pool = pool
        self._dit = dit
        self._clock = clock
        self._readers = Readers(_READERS, "krea2-srt adapters")
        self._lister = Readers(1, "krea2-srt adapter list")
        self._listing: Future[dict[str, LibraryAdapter]] | None = None
        self._listing_begun = 0.0
        self._cards: _Cards = {}
        # By name in the folder.
        self._known: dict[str, LibraryAdapter] = {}
        self._looked: dict[str, float] = {}
        self._looking: dict[str, Future[LibraryAdapter]] = {}
        self.set_names(SetAdapterNames())

    def ask(self, choices: Collection[AdapterChoice]) -> "AwaitedAdapters":
        """Have adapters read that are not there as they are now."""
        looks = {choice: self._look_for(choice.name) for choice in choices}
        return AwaitedAdapters(looks, self._pool)

    def ask_as(self, name: str, choice: AdapterChoice) -> "AwaitedAdapters":
        """The same of one adapter, which goes by another name."""
        return AwaitedAdapters({choice: self._look_for(name)}, self._pool)

    def name_of(self, path: str) -> str | None:
        """The name of an adapter whose path is told, in the folder or from outside; None of one
        that is not in the folder.
        """
        inside = Path(path)
        if inside.is_absolute():
            try:
                inside = inside.relative_to(self._folder.absolute())
            except ValueError:
                return None
        name = inner_name("", str(inside))
        return name if is_adapter_name(name) and _is_there(self._folder, name) else None

    def collect(self) -> None:
        """Take in what was read since the last call; before what was asked for is looked at."""
        for name, future in list(self._looking.items()):
            if not future.done():
                continue
            del self._looking[name]
            self._listing = None  # it would not know
            if future.exception() is None:
                self._looked[name] = self._clock()
                self._take_in(name, future.result())
            else:
                self._known.pop(name, None)
                self._looked.pop(name, None)

    def read(self, name: str, path: str) -> "AwaitedAdapters":
        """Have an adapter read that is to be served under a name; `serve` is to follow.

        Args:
            path: of its file or folder in the folder; "" is where its name says.

        Raises:
            RequestError: neither can be; names ``lora_name`` or ``lora_path``.
        """
        inner = inner_name(name, path)
        for field, one in (("lora_name", name), ("lora_path", inner)):
            if not is_adapter_name(one):
                raise RequestError(field, f"{one!r} cannot be an adapter's: {ADAPTER_NAMES}")
        looks = {AdapterChoice(inner): self._look(inner)}
        if inner != name:
            looks[AdapterChoice(name)] = self._look(name)
        return AwaitedAdapters(looks, self._pool)

    def serve(self, name: str, path: str, read: "AwaitedAdapters") -> AdapterInfo:
        """Serve what was read under a name from now on.

        Args:
            read: what `read` has given.

        Raises:
            RequestError: it is not there, or the name is another's; names ``lora_name`` or
                ``lora_path``.
            AdapterError: it cannot be used.
        """
        inner = inner_name(name, path)
        field = "lora_path" if path else "lora_name"
        try:
            read.result_of(inner)
        except UnknownAdapterError:
            raise RequestError(field, f"there is no adapter {inner!r} in the folder") from None
        if inner != name:
            there = name not in self._unloaded and read.is_there(name)
            if there or self._aliases.get(name, inner) != inner:
                text = f"{name!r} is another adapter's; unload that one first"
                raise RequestError("lora_name", text)
        self.set_names(self._names.after_load(name, path))
        return self._located(self._known[inner].info(name))

    def unload(self, name: str) -> None:
        """Serve no adapter under a name any more; its file stays, and other names of it."""
        inner = self._aliases.get(name, name)
        self.set_names(self._names.after_unload(name))
        if inner in self._known:
            self._pool.drop(self._known[inner].digest)

    def set_names(self, names: SetAdapterNames) -> None:
        """What `serve` and `unload` have come to, here or elsewhere; a file that is missing stays
        missing under its other name.
        """
        self._names = names
        # Those that were given by hand, and those of the folder that were taken away.
        self._aliases, self._unloaded = dict(names.aliases), names.unloaded

    def listing(self) -> "Future[dict[str, LibraryAdapter]]":
        """Have the folder looked through, for `infos`; what is fresh is taken again."""
        listing = self._listing
        old = self._clock() - self._listing_begun >= FRESH_S
        if listing is None or (listing.done() and old):
            work = partial(_listed, self._folder, dict(self._known), self._cards)
            listing = self._listing = self._lister.submit(work)
            self._listing_begun = self._clock()
        return listing

    def infos(self, listing: "Future[dict[str, LibraryAdapter]]") -> tuple[AdapterInfo, ...]:
        """What was listed, by the names that are served, and where each is now.

        Raises:
            AdapterError: the folder cannot be read.
        """
        try:
            there = listing.result()
        except OSError as error:
            raise AdapterError(f"the folder of adapters: {unreadable(error)}") from None
        inner = {name: name for name in there.keys() - self._unloaded - self._aliases.keys()}
        inner |= {alias: name for alias, name in self._aliases.items() if name in there}
        return tuple(self._located(there[inner[name]].info(name)) for name in sorted(inner))

    def statistics(self) -> dict[str, tuple[str, int]]:
        """Where adapters are, and the bytes of their files; those of the disk alone are not told.

        By the names that are served.
        """
        names = {name: name for name in self._known.keys() - self._unloaded} | self._aliases
        found = {}
        for name, inner in names.items():
            if (known := self._known.get(inner)) is not None:
                where = self._pool.where(known.digest)
                if where != "disk":
                    found[name] = (where, known.nbytes)
        return found

    def close(self) -> None:
        """End the threads; those that wait for a disk end with the process."""
        self._readers.close()
        self._lister.close()

    def _inner(self, name: str) -> str:
        """The name in the folder.

        Raises:
            UnknownAdapterError: it is none that is served.
        """
        if name in self._aliases:
            return self._aliases[name]
        if name in self._unloaded or not is_adapter_name(name):
            raise UnknownAdapterError(name)
        return name

    def _look_for(self, name: str) -> "Future[LibraryAdapter]":
        try:
            return self._look(self._inner(name))
        except UnknownAdapterError as error:
            unknown: Future[LibraryAdapter] = Future()
            unknown.set_exception(error)
            return unknown

    def _look(self, name: str) -> "Future[LibraryAdapter]":
        """An adapter as its files are now."""
        if (looking := self._looking.get(name)) is not None:
            return looking
        known = self._known.get(name)
        if known is not None:
            known = replace(known, adapter=self._pool.host_copy(known.digest))
            if known.adapter is not None and self._clock() - self._looked[name] < FRESH_S:
                fresh: Future[LibraryAdapter] = Future()
                fresh.set_result(known)
                return fresh
        work = partial(_read, self._folder, name, known, self._dit, self._cards)
        self._looking[name] = self._readers.submit(work)
        return self._looking[name]

    def _take_in(self, name: str, found: LibraryAdapter) -> None:
        self._known[name] = replace(found, adapter=None)
        if found.adapter is not None:
            self._pool.put(found.adapter, found.path)

    def _located(self, info: AdapterInfo) -> AdapterInfo:
        return replace(info, where=self._pool.where(info.digest))


class AwaitedAdapters:
    """The adapters that one request is generated with, while they are read.

    Args:
        looks: for each that it asks for.
        pool: keeps them.
    """

    def __init__(
        self, looks: "Mapping[AdapterChoice, Future[LibraryAdapter]]", pool: AdapterPool
    ) -> None:
        self._looks = looks
        self._pool = pool

    @property
    def done(self) -> bool:
        """Whether all were looked at."""
        return all(look.done() for look in self._looks.values())

    def result(self) -> tuple[frozenset[AdapterUse], tuple[PlacedAdapter, ...]]:
        """What they are, and the adapters: they are there for as long as somebody has these.

        Raises:
            AdapterError, UnknownAdapterError: one is not there, or cannot be used.
        """
        uses, held = [], []
        for choice, look in self._looks.items():
            found = _looked_at(look, choice.name)
            scale = found.card.default_scale if choice.scale is None else choice.scale
            uses.append(AdapterUse(choice.name, found.digest, scale))
            held.append(self._kept(found))
        return frozenset(uses), tuple(held)

    def result_of(self, name: str) -> PlacedAdapter:
        """The same of one of them, by its name."""
        (look,) = (look for choice, look in self._looks.items() if choice.name == name)
        return self._kept(_looked_at(look, name))

    def is_there(self, name: str) -> bool:
        """Whether there is a file of a name, in whatever state."""
        (look,) = (look for choice, look in self._looks.items() if choice.name == name)
        return not isinstance(look.exception(), UnknownAdapterError)

    def _kept(self, found: LibraryAdapter) -> PlacedAdapter:
        assert found.adapter is not None
        # The pool's own, which is the one that images are given.
        return self._pool.put(found.adapter, found.path)


def _looked_at(look: "Future[LibraryAdapter]", name: str) -> LibraryAdapter:
    try:
        found = look.result()
    except UnknownAdapterError:
        raise UnknownAdapterError(name) from None
    except OSError as error:
        raise AdapterError(f"adapter {name}: {unreadable(error)}") from None
    if found.error:
        raise AdapterError(f"adapter {name}: {found.error}")
    return found


# What the threads do.


def _is_there(folder: Path, name: str) -> bool:
    try:
        find_adapter(folder, name)
    except AdapterError as error:
        return not isinstance(error, NoAdapterError)
    return True


def _read(
    folder: Path, name: str, known: LibraryAdapter | None, dit: Krea2DiT, cards: _Cards
) -> LibraryAdapter:
    """An adapter as its files are now; read where they are not as they are known, or it is not on
    the host.
    """
    found = _at(folder, name, cards)
    if found.error:
        return found
    if known is not None and known.stamp == found.stamp:
        if known.error:
            return replace(found, error=known.error)
        if known.adapter is not None:
            return replace(known, card=found.card)
    try:
        adapter = read_adapter(found.path, dit.config, called=name)
        placed = PlacedAdapter.on_host(dit, adapter)
    except UnreadableError as error:
        return replace(found, stamp=(), error=_without(name, error))
    except AdapterError as error:
        return replace(found, error=_without(name, error))
    return replace(found, digest=adapter.digest, rank=adapter.rank, adapter=placed)


def _at(folder: Path, name: str, cards: _Cards) -> LibraryAdapter:
    """What can be said of an adapter without reading it.

    Raises:
        UnknownAdapterError: there is none.
        OSError: it cannot be looked at.
    """
    try:
        path = find_adapter(folder, name)
        files = AdapterFiles.at(path)
    except NoAdapterError:
        raise UnknownAdapterError(name) from None
    except AdapterError as error:
        return LibraryAdapter(folder / name, (), 0, AdapterCard(), error=_without(name, error))
    stamp = files.stamp()
    found = LibraryAdapter(path, stamp, sum(size for _, size, _ in stamp), AdapterCard())
    card = _card(folder, name, cards)
    if isinstance(card, AdapterCard):
        return replace(found, card=card)
    # Without a stamp: the files may be the same when the card is mended.
    return replace(found, stamp=(), error=card)


def _card(folder: Path, name: str, cards: _Cards) -> AdapterCard | str:
    """An adapter's card, or what is wrong with it."""
    file = folder / f"{name}.yaml"
    try:
        at = file.stat()
    except FileNotFoundError:
        return AdapterCard()
    stamp = (at.st_ino, at.st_size, at.st_mtime_ns)
    known = cards.get(file)
    if known is not None and known[0] == stamp:
        return known[1]
    card: AdapterCard | str
    if not file.resolve().is_relative_to(folder.resolve()):
        card = f"{file.name} is a link that leads out of the folder"
    else:
        try:
            card = read_card(file)
        except AdapterError as error:
            card = str(error)
    cards[file] = stamp, card
    return card


def _listed(
    folder: Path, known: Mapping[str, LibraryAdapter], cards: _Cards
) -> dict[str, LibraryAdapter]:
    """All that lie in a folder, with what is known of those that have not changed."""
    found = {}
    for name in adapter_names(folder):
        try:
            one = _at(folder, name, cards)
        except (UnknownAdapterError, OSError):
            continue  # it has gone since
        except Exception as error:
            one = LibraryAdapter(folder / name, (), 0, AdapterCard(), error=str(foreign(error)))
        before = known.get(name)
        if before is not None and before.stamp == one.stamp and not one.error:
            one = replace(before, card=one.card)
        found[name] = one
    return found


def _without(name: str, error: AdapterError) -> str:
    """An error's text but for the name that it begins with: it may be served under others."""
    return str(error).removeprefix(f"adapter {name}: ")
