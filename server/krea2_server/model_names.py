"""What clients call the model."""

from dataclasses import dataclass

from krea2_server.settings import Settings
from krea2_srt.messages import ModelInfo
from krea2_srt.model.parts import last_part
from krea2_srt.request import is_adapter_name


@dataclass(frozen=True)
class ModelNames:
    """The names under which one model is served.

    Attributes:
        own: its name; "" while it is not known, of engines that others start.
        path: folder or repo id, which is a name too; "" as `own`.
        aliases: other names; ``*`` is any without a colon.
        any_case: whether capitals matter to nobody.
    """

    own: str
    path: str
    aliases: tuple[str, ...] = ()
    any_case: bool = True

    @classmethod
    def of(cls, settings: Settings, model: ModelInfo | None) -> "ModelNames":
        """The names that the settings give it.

        Args:
            model: what the engine says that it serves. Where engines are others' to start, that
                is what the model is called by, and not a path of ours.
        """
        path = settings.model_path
        if settings.engine_endpoints:
            path = model.path if model is not None else ""
        aliases = tuple(settings.model_aliases)
        own = settings.served_model_name or name_of(path)
        return cls(own, path, aliases, settings.accept == "common")

    @property
    def known(self) -> bool:
        """Whether all names are known, so that another is no name of it."""
        return bool(self.path)

    @property
    def listed(self) -> list[str]:
        """The names that can be told."""
        return [name for name in (self.own, *self.aliases) if name not in ("", "*")]

    def adapter_in(self, name: str) -> str | None:
        """The adapter of ``MODEL:ADAPTER``, whose name has no colon; None of another name."""
        model, _, adapter = name.rpartition(":")
        return adapter if is_adapter_name(adapter) and self.serves(model) else None

    def serves(self, name: str) -> bool:
        """Whether a client may call the model that."""
        names = {self.own, self.path, *self.aliases} - {""}
        if name in names or ("*" in names and ":" not in name):
            return True
        # The last part of the path is the name but for its capitals, unless another is set.
        names |= {last_part(self.path)} - {""}
        return self.any_case and name.casefold() in {known.casefold() for known in names}


def name_of(path: str) -> str:
    """The name of a model in a folder or a file, in the hub's cache, or with a repo id."""
    return last_part(path).lower()
