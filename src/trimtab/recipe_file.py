"""A YAML file whose every key and value knows its line, so that a complaint can name it."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .errors import RecipeError, did_you_mean

Loc = tuple[str | int, ...]  # ("training", "epochs"); () is the file itself


class _Loader(yaml.SafeLoader):
    """Numbers and booleans as YAML 1.2 has them: 5e-4 is a number (1.1 reads a text), `on` and `no` are words."""


_CHANGED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in _CHANGED]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan"
_Loader.add_implicit_resolver(_CHANGED[0], re.compile(rf"^(?:{_FLOAT})$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(_CHANGED[1], re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class RecipeFile:
    """The tree of a YAML mapping.

    Raises:
        RecipeError: a file that is not there, is no YAML, or no mapping; a key that is there twice.
    """

    def __init__(self, path: Path, text: str | None = None) -> None:
        """text: what is in the file, where that is known."""
        self.path = path
        try:
            text = path.read_text(encoding="utf-8") if text is None else text
        except FileNotFoundError:
            beside = sorted(other.name for end in ("*.yaml", "*.yml") for other in path.parent.glob(end))
            raise RecipeError(f"There is no recipe {path}.{did_you_mean(path.name, beside)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}.") from None
        self.tree = self._compose(text, str(path))
        if not isinstance(self.tree, MappingNode):
            raise RecipeError(f"{path} is no recipe: it should start with `task: ...`.")

    def value(self) -> Any:
        """The file's content as plain Python values."""
        return _plain(self.tree)

    def set(self, override: str) -> None:
        """Put a value in its place: `training.epochs=1`, the value written as in the file."""
        where, equals, text = override.partition("=")
        if not equals or not where.strip():
            raise RecipeError(f"--set {override}: write KEY=VALUE, for example --set training.epochs=1.")
        value = self._compose(text, f"--set {override}")
        assert isinstance(self.tree, MappingNode)
        node: MappingNode = self.tree
        *parents, last = where.strip().split(".")
        for parent in parents:
            node = self._child(node, parent, override)
        node.value[:] = [pair for pair in node.value if pair[0].value != last]
        node.value.append((ScalarNode("tag:yaml.org,2002:str", last, value.start_mark), value))

    def _child(self, node: MappingNode, key: str, override: str) -> MappingNode:
        found = next((value for name, value in node.value if name.value == key), None)
        mark = yaml.Mark(f"--set {override}", 0, 0, 0, "", 0)
        if found is None:
            found = MappingNode("tag:yaml.org,2002:map", [], mark)
            node.value.append((ScalarNode("tag:yaml.org,2002:str", key, mark), found))
        elif isinstance(found, ScalarNode) and key == "method":  # `method: lora` is short for {name: lora}
            name = ScalarNode("tag:yaml.org,2002:str", "name", found.start_mark)
            short, found = found, MappingNode("tag:yaml.org,2002:map", [(name, found)], found.start_mark)
            node.value[:] = [(name, found if value is short else value) for name, value in node.value]
        if not isinstance(found, MappingNode):
            raise RecipeError(f"--set {override}: {key} is no mapping in {self.path}.")
        return found

    def name(self, at: Loc) -> str:
        return ".".join(str(part) for part in at) or "the recipe"

    def error(self, at: Loc, message: str) -> RecipeError:
        """The complaint, with the line of the key it is about, or of the nearest one above."""
        mark = self._mark(at)
        line = "" if mark.name.startswith("--set ") else f":{mark.line + 1}"
        return RecipeError(f"{mark.name}{line}: {message}")

    def check_keys(self, at: Loc, known: Iterable[str] | None) -> None:
        """Raise a RecipeError if `at` is no mapping, or has a key that is not known (None: any will do)."""
        node = self._node(at)
        if node is None or _plain(node) is None:
            return
        if not isinstance(node, MappingNode):
            raise self.error(at, f"{self.name(at)} should be a mapping, that is keys with values.")
        options = list(known or ())
        for key, _ in node.value:
            if known is not None and key.value not in options:
                hint = did_you_mean(key.value, options)
                raise self.error((*at, key.value), f"{self.name(at)} has no key {key.value!r}.{hint}")

    def is_mapping(self, at: Loc) -> bool:
        return isinstance(self._node(at), MappingNode)

    def check_choice(self, at: Loc, value: Any, options: Collection[str]) -> None:
        if value not in tuple(options):  # a list or a mapping could be no key of a dict
            hint = did_you_mean(str(value), options)
            raise self.error(at, f"{self.name(at)}: there is no {value!r}.{hint}")

    def has(self, at: Loc) -> bool:
        return self._node(at) is not None

    def _mark(self, at: Loc) -> Any:
        node, mark = self.tree, self.tree.start_mark
        for part in at:
            if isinstance(node, MappingNode):
                pair = next(((key, value) for key, value in node.value if key.value == part), None)
                if pair is None:
                    break
                mark, node = pair[0].start_mark, pair[1]
            elif isinstance(node, SequenceNode) and isinstance(part, int):
                node = node.value[part]
                mark = node.start_mark
            else:
                break
        return mark

    def _node(self, at: Loc) -> Node | None:
        node: Node | None = self.tree
        for part in at:
            if isinstance(node, SequenceNode) and isinstance(part, int):
                node = node.value[part]
                continue
            pairs = node.value if isinstance(node, MappingNode) else ()
            node = next((value for key, value in pairs if key.value == part), None)
        return node

    def _compose(self, text: str, name: str) -> Node:
        loader = _Loader(text)
        loader.name = name
        try:
            node = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise RecipeError(f"{name}{line}: this is no YAML: {error.problem}.") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{name}: this is no YAML: {error}.") from None
        finally:
            loader.dispose()
        if node is None:
            node = ScalarNode("tag:yaml.org,2002:null", "", yaml.Mark(name, 0, 0, 0, "", 0))
        self._check_twice(node)
        return node

    def _check_twice(self, node: Node) -> None:
        if isinstance(node, MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                mark = key.start_mark
                if not isinstance(key, ScalarNode):
                    raise RecipeError(f"{mark.name}:{mark.line + 1}: a key must be a word.")
                if key.value in seen:
                    raise RecipeError(
                        f"{mark.name}:{mark.line + 1}: {key.value!r} is there twice, first in line {seen[key.value]}."
                    )
                seen[key.value] = mark.line + 1
                self._check_twice(value)
        elif isinstance(node, SequenceNode):
            for value in node.value:
                self._check_twice(value)


def _plain(node: Node) -> Any:
    """The node's value; keys stay the words they are in the file, and those without a value are left out."""
    if isinstance(node, MappingNode):
        return {key.value: found for key, value in node.value if (found := _plain(value)) is not None}
    if isinstance(node, SequenceNode):
        return [_plain(value) for value in node.value]
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()
