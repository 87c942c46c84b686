"""YAML files of settings, keys and policies: read whole, or told in one line what is wrong."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class YamlFileError(Exception):
    """A file cannot be read; says why, and nothing of what is in it, which may be secret."""


def read_yaml(file: Path) -> Any:
    """The file's content.

    Raises:
        YamlFileError: it cannot be read.
    """
    try:
        # A safe loader, with one more check.
        return yaml.load(file.read_text(encoding="utf-8"), _UniqueKeysLoader)
    except OSError as error:
        raise YamlFileError(error.strerror) from None
    except UnicodeDecodeError:
        raise YamlFileError("is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise YamlFileError(f"{line}{error.problem}") from None
    except yaml.YAMLError as error:
        raise YamlFileError(f"is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise YamlFileError("is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, IndexError):
        # Of a tag that does not fit its value; their texts quote it.
        raise YamlFileError("is not YAML: a value does not fit its tag") from None


class _UniqueKeysLoader(yaml.SafeLoader):
    """Does not let a second ``checkers`` quietly take the place of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        return super().construct_mapping(node, deep)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name} is there twice", problem_mark=key.start_mark
                )
            seen.add(name)
