"""SGLang's ``/v1/set_lora`` and its kin: adapters of all requests that come by SGLang's API.

SGLang's own merges them into the weights, for all that is under way. Here they stand beside the
model, for what comes from then on, so nothing is waited for and nothing is lost in rounding.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.runtime.entrypoints.control_requests import (
    ListLorasReq,
    MergeLoraWeightsReq,
    SetLoraReq,
    UnmergeLoraWeightsReq,
)
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch
from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_lora

from krea2_srt.errors import AdapterError, Krea2Error, RequestError, first_line
from krea2_srt.lora.library import AwaitedAdapters
from krea2_srt.lora.placed import PlacedAdapter
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.lora.reader import read_adapter
from krea2_srt.lora.readers import Readers
from krea2_srt.lora.scaled_files import is_there
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.request import MAX_ADAPTER_SCALE as MAX_SCALE
from krea2_srt.request import AdapterChoice, AdapterUse, check_choices, check_number
from krea2_srt.sglang.exchange import Exchange
from krea2_srt.sglang.served_adapters import NO_FOLDER, ServedAdapters
from krea2_srt.sglang.sglang_exchange import SglangExchange

Reply = Callable[[OutputBatch], None]
_OURS = ("all", "transformer")
"""Targets that are this model's: it has one transformer."""


@dataclass(frozen=True)
class _Set:
    """Adapters that were set together.

    Attributes:
        uses: with their scales.
        held: what keeps them.
        paths: what they were asked for by, by name.
    """

    uses: frozenset[AdapterUse] = frozenset()
    held: object = None
    paths: tuple[tuple[str, str], ...] = ()


class DefaultAdapters:
    """What requests have that come by SGLang's API, which has no field for adapters.

    Args:
        served: has the folder's adapters.
        pool: keeps those from elsewhere.
        dit: the model that they are for.
        any_path: whether files outside of the folder, and repos, may be named.
    """

    def __init__(
        self, served: ServedAdapters, pool: AdapterPool, dit: Krea2DiT, any_path: bool
    ) -> None:
        self._served = served
        self._pool = pool
        self._dit = dit
        self._any_path = any_path
        self._set = _Set()
        self._is_on = False
        self._readers = Readers(2, "krea2-srt set_lora")
        self._commands = 0

    def of(self, exchange: Exchange) -> tuple[frozenset[AdapterUse], object]:
        """The adapters of a request that names none, and what keeps them."""
        if self._is_on and isinstance(exchange, SglangExchange):
            return self._set.uses, self._set.held
        return frozenset(), None

    def command(self, command: Any, reply: Reply) -> None:
        """Do what one of SGLang's requests says, and reply, now or when files have been read."""
        if not isinstance(command, ListLorasReq):
            self._commands += 1
        try:
            match command:
                case SetLoraReq():
                    self._begin_set(command, reply)
                    return
                case MergeLoraWeightsReq():
                    self._switch_on(command)
                case UnmergeLoraWeightsReq():
                    _check_target(command.target)
                    self._is_on = False
                case ListLorasReq():
                    reply(OutputBatch(output=self._status()))
                    return
            reply(OutputBatch())
        except Krea2Error as error:
            reply(OutputBatch(error=str(error)))

    def close(self) -> None:
        """End the threads."""
        self._readers.close()

    def _begin_set(self, request: SetLoraReq, reply: Reply) -> None:
        names = _several(request.lora_nickname)
        paths = _several(request.lora_path, len(names))
        scales = _several(request.strength, len(names))
        for target in _several(request.target):
            _check_target(target)
        if any(alpha is not None for alpha in _several(request.lora_alpha)):
            raise RequestError("lora_alpha", "the adapter's own counts here; give a strength")
        if not len(names) == len(paths) == len(scales):
            raise RequestError("lora_path", "must be as many as lora_nickname, as must strength")
        choices = [AdapterChoice(*both) for both in zip(names, scales, strict=True)]
        for choice in choices:
            if not isinstance(choice.name, str) or not choice.name:
                raise RequestError("lora_nickname", f"must be text, got {choice.name!r}")
        if len(set(names)) < len(names):
            raise RequestError("lora_nickname", f"must be different names, got {names}")
        check_choices(frozenset(choices))
        looks = [self._look(choice, path) for choice, path in zip(choices, paths, strict=True)]
        told = tuple(
            zip(names, (path or name for name, path in zip(names, paths, strict=True)), strict=True)
        )
        self._served.wait_for(
            lambda: all(look.done for look in looks),
            partial(self._end_set, looks, told, self._commands, reply),
            lambda error: reply(OutputBatch(error=str(error))),
        )

    def _end_set(
        self,
        looks: "list[AwaitedAdapters | _Elsewhere]",
        paths: Any,
        number: int,
        reply: Reply,
    ) -> None:
        try:
            found = [look.result() for look in looks]
        except Krea2Error as error:
            reply(OutputBatch(error=str(error)))
            return
        uses = frozenset(use for some, _ in found for use in some)
        if number != self._commands:
            reply(OutputBatch(error="another command came while the adapters were read"))
            return
        self._set = _Set(uses, [held for _, held in found], paths)
        self._is_on = True
        reply(OutputBatch())

    def _look(self, choice: AdapterChoice, path: str | None) -> "AwaitedAdapters | _Elsewhere":
        """Have an adapter read: in the folder by its name or path, or elsewhere."""
        library = self._served.library
        name = choice.name
        known = dict(self._set.paths).get(name)
        path = path or known or ""
        inside = None
        if library is not None:
            inside = library.name_of(path) if path else name
        if inside is not None:
            assert library is not None
            library.collect()
            return library.ask_as(inside, choice)
        if not self._any_path:
            if library is None:
                raise AdapterError(NO_FOLDER)
            raise AdapterError(
                f"lora_path: {path!r} is not in the folder of adapters; "
                "KREA2_SRT_LORA_ANY_PATH=on allows others"
            )
        if not path:
            raise RequestError("lora_path", f"{name!r} is not known; name its file, folder or repo")
        return _Elsewhere(
            self._readers.submit(partial(_read, path, name, self._dit)), choice, self._pool
        )

    def _switch_on(self, request: MergeLoraWeightsReq) -> None:
        _check_target(request.target)
        check_number("strength", request.strength, -MAX_SCALE, MAX_SCALE)
        if not self._set.uses:
            raise AdapterError("no adapter is set; /v1/set_lora sets one")
        uses = frozenset(replace(use, scale=request.strength) for use in self._set.uses)
        self._set, self._is_on = replace(self._set, uses=uses), True

    def _status(self) -> dict[str, Any]:
        """As SGLang has it."""
        paths = dict(self._set.paths)
        loaded = [{"nickname": name, "path": path} for name, path in paths.items()]
        if not self._is_on:
            return {"loaded_adapters": loaded, "active": {}}
        uses = sorted(self._set.uses, key=lambda use: use.name)
        active = {
            "nickname": ",".join(use.name for use in uses),
            "nicknames": [use.name for use in uses],
            "path": ",".join(paths[use.name] for use in uses),
            "merged": False,
            "mode": "unmerged",
            "strength": uses[0].scale,
            "strengths": [use.scale for use in uses],
        }
        return {"loaded_adapters": loaded, "active": {"transformer": [active]}}


class _Elsewhere:
    """An adapter from outside of the folder, on its way; as `AwaitedAdapters`."""

    def __init__(
        self,
        look: "Future[tuple[Path, PlacedAdapter]]",
        choice: AdapterChoice,
        pool: AdapterPool,
    ) -> None:
        self._look = look
        self._choice = choice
        self._pool = pool

    @property
    def done(self) -> bool:
        return self._look.done()

    def result(self) -> tuple[frozenset[AdapterUse], object]:
        path, adapter = self._look.result()
        adapter = self._pool.put(adapter, path)
        scale = 1.0 if self._choice.scale is None else self._choice.scale
        return frozenset({AdapterUse(self._choice.name, adapter.digest, scale)}), adapter


def _read(path: str, name: str, dit: Krea2DiT) -> tuple[Path, PlacedAdapter]:
    """In a thread: an adapter of a file, a folder or a repo of the hub."""
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:  # there is no such user
        raise AdapterError(f"lora_path: {first_line(error)}") from None
    if not is_there(file):
        try:
            file = Path(maybe_download_lora(path))
        except Exception as error:  # whatever the hub's client raises
            raise AdapterError(f"lora_path: {first_line(error)}") from None
    return file, PlacedAdapter.on_host(dit, read_adapter(file, dit.config, called=name))


def _several(value: Any, count: int = 1) -> list[Any]:
    """A list of what may be one for all."""
    return list(value) if isinstance(value, list) else [value] * count


def _check_target(target: Any) -> None:
    if target not in _OURS:
        raise RequestError("target", f"must be all or transformer, got {target!r}")
