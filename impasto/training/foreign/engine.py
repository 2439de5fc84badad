"""From another trainer's settings to a recipe: a table says what becomes of each key, and each one is accounted for.

A `Row` is one key of theirs. Rules, where several keys make one of ours, take what they need from the `Work` first;
the table has the rest. What no rule took, and is in no table, is told as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import pydantic
import tomli_w

from impasto.core.errors import UserError
from impasto.training.foreign.table import Row, flag, nothing
from impasto.training.recipe import Recipe, make_recipe

#: keys whose values nobody should read in a report
SECRET = re.compile(r"(^|[._])(api_key|password|secrets?|huggingface_token|hf_token|user)\b")

T = TypeVar("T")


@dataclass(frozen=True)
class Carried:
    """`key = value` of theirs became `to = becomes`. Without a key, it is their default, where their file is silent."""

    key: str
    value: Any
    to: str
    becomes: Any
    why: str = ""


@dataclass(frozen=True)
class Left:
    """`key = value` of theirs has no place in the recipe; `here` is ours in its place, and `instead` its value."""

    key: str
    value: Any
    why: str
    here: str = ""
    instead: Any = None


@dataclass(frozen=True)
class Subset:
    """Settings of one more set of pictures, under the names that the first one's have, and what to call them."""

    label: str  # "datasets.0.subsets.1"
    settings: Mapping[str, Any]
    prefix: str = ""  # that is not told: "concept."

    def key(self, key: str) -> str:
        """A key of its as people are told of it."""
        return f"{self.label}.{key.removeprefix(self.prefix)}" if key else ""


@dataclass
class Imported:
    """The recipe, as a tree that `make_recipe` takes, and what became of each key of the other trainer's."""

    trainer: str
    files: list[str]
    tree: dict[str, Any]
    carried: list[Carried] = field(default_factory=list)
    lost: list[Left] = field(default_factory=list)
    needless: list[Left] = field(default_factory=list)
    unknown: list[Left] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    to_fill_in: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """All of it, JSON-able, the recipe as TOML too."""
        return asdict(self) | {"toml": self.toml()}

    def toml(self) -> str:
        """The recipe, with a comment for whatever was not carried over or is to be filled in."""
        comments = [f"From {', '.join(self.files)} ({self.trainer}), by impasto import-recipe."]
        comments += [f"To fill in: {key}: {why}" for key, why in self.to_fill_in.items()]
        comments += [f"Not carried over: {left.key}{'' if left.value is None else f' = {left.value}'}: {left.why}"
                     for left in (*self.lost, *self.unknown)]
        return "".join(f"# {one_line(comment)[:300]}\n" for comment in comments) + "\n" + tomli_w.dumps(self.tree)


def one_line(words: str) -> str:
    """Without line breaks and control characters, which a comment in TOML cannot hold."""
    return "".join(c if c.isprintable() else " " for c in words)


class Work:
    """One translation on its way: settings still to be told of, and what has been told so far."""

    def __init__(self, trainer: str, table: Mapping[str, Row], settings: Mapping[str, Any]) -> None:
        self.table, self.settings = table, dict(settings)
        self.waiting = dict(self.settings)
        self.told = Imported(trainer, [], {})
        self.further: list[tuple[Subset, Work]] = []

    def get(self, key: str, default: Any = None) -> Any:
        """A setting's value, or the default where it says nothing; it is still to be told of."""
        value = self.settings.get(key)
        return default if nothing(value) else value

    def put(self, to: str, becomes: Any, *keys: str, why: str = "") -> None:
        """A recipe key, out of `keys`; without keys it is their default, and `why` says so."""
        set_before = next((done for done in self.told.carried if done.to == to and done.becomes != becomes), None)
        for key in keys or ("",):
            self.waiting.pop(key, None)
            if set_before is None:
                self.told.carried.append(Carried(key, self._shown(key), to, becomes, why))
            elif key:
                self.told.lost.append(Left(key, self._shown(key), f"{set_before.key or 'their default'} says another "
                                           f"value for {to}", to))

    def lose(self, key: str, why: str, here: str = "") -> None:
        """A setting that is not carried over; one that is not there may be told of too, if its absence matters."""
        self.waiting.pop(key, None)
        self.told.lost.append(Left(key, self._shown(key), why, here))

    def spare(self, *keys: str, why: str) -> None:
        """Settings that lose nothing by not being carried over."""
        for key in keys:
            if not nothing(self.waiting.pop(key, None)):
                self.told.needless.append(Left(key, self._shown(key), why))

    def fill(self, to: str, placeholder: Any, why: str) -> None:
        """A recipe key that their file cannot tell."""
        self.put(to, placeholder, why=why)
        self.told.to_fill_in[to] = why

    def read(self, key: str, turn: Callable[[Any], T], default: T) -> T:
        """A setting for a rule; one that cannot be read is told of, and the default is taken."""
        try:
            return default if self.get(key) is None else turn(self.get(key))
        except ValueError as error:
            self.lose(key, _reason(error), self.table[key].to or self.table[key].here)
            del self.settings[key]
            return default

    def on(self, key: str) -> bool:
        """Whether a switch of theirs is on."""
        return self.read(key, flag, False)

    def becomes(self, to: str) -> Any:
        """What has been put at a recipe key so far, or None."""
        return next((done.becomes for done in self.told.carried if done.to == to), None)

    def finish(self, files: Iterable[str]) -> Imported:
        """What no rule took goes by the table; then the recipe is checked, and what it refuses is told of."""
        for key, value in list(self.waiting.items()):
            self._by_table(key, value)
        assert not self.waiting, self.waiting
        for number, (subset, work) in enumerate(self.further, 1):
            self._adopt(number, subset, work)
        self.told.files = list(files)
        recipe = self._settle()
        if re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.base.place) and "base.path" not in self.told.to_fill_in:
            self.told.notes.append(f"if {recipe.base.path} is a hub id, it is read from the local cache; "
                                   "base.download = true fetches it")
        self.told.lost = [Left(each.key, each.value, each.why, each.here, value_at(recipe, each.here))
                          for each in self.told.lost]
        return self.told

    def add_set(self, subset: Subset, shared: Mapping[str, Any], rules: Iterable[Callable[[Work], None]]) -> None:
        """One more set of pictures, by rules as the first one's, of its own settings and those that all share."""
        work = Work(self.told.trainer, self.table, {**shared, **subset.settings})
        for rule in rules:
            rule(work)
        self.further.append((subset, work))

    def _adopt(self, number: int, subset: Subset, work: Work) -> None:
        """Take over what became of a set's settings; what a recipe has once must be what the first set has."""
        for key, value in list(work.waiting.items()):
            work._by_table(key, value)
        own, told = subset.settings, work.told
        for done in told.carried:
            if done.to.startswith("data."):
                self.told.carried.append(replace(done, key=subset.key(done.key), to=_of_set(done.to, number)))
            elif done.key in own and done.becomes != self.becomes(done.to):
                self.told.lost.append(Left(subset.key(done.key), done.value, "all sets have one", done.to))
        for ours, theirs in ((self.told.lost, told.lost), (self.told.needless, told.needless),
                             (self.told.unknown, told.unknown)):
            ours += [replace(left, key=subset.key(left.key), here=_of_set(left.here, number)) for left in theirs
                     if left.key in own]
        self.told.without_effect += [subset.key(key) for key in told.without_effect if key in own]

    def _by_table(self, key: str, value: Any) -> None:
        parents = [f"{key[:i]}.*" for i, c in enumerate(key) if c == "."]
        row = next((self.table[each] for each in (key, *reversed(parents)) if each in self.table), None)
        if row is None:
            self.waiting.pop(key)
            self.told.unknown.append(Left(key, self._shown(key), "is no key that we know"))
        elif nothing(value, row.neutral) or not row.to and nothing(value, (False, 0)):
            self.waiting.pop(key)
            self.told.without_effect.append(key)
        elif row.to:
            try:
                self.put(row.to, row.turn(value), key, why=row.why)
            except ValueError as error:
                self.lose(key, _reason(error), row.to)
        elif row.needless:
            self.spare(key, why=row.why)
        else:
            self.lose(key, row.why, row.here)

    def _shown(self, key: str) -> Any:
        """A setting's value for a report, JSON-able; a secret stays one."""
        value = self.settings.get(key)
        if SECRET.search(key) and value:
            return "(hidden)"
        return value if isinstance(value, str | int | float | bool | None) else \
            [str(item) for item in value] if isinstance(value, list) else str(value)

    def _settle(self) -> Recipe:
        """Build the tree, and leave out whatever the recipe refuses, the last one first."""
        while True:
            self.told.tree = _tree(self.told.carried)
            try:
                return make_recipe(self.told.tree)
            except UserError as error:
                refused = self._refused()
                if refused is None:
                    raise
                gone = [each for each in self.told.carried if each.to == refused]
                self.told.carried = [each for each in self.told.carried if each.to != refused]
                self.told.lost += [Left(each.key or "(their default)", each.value, f"the recipe refuses "
                                        f"{refused} = {each.becomes}: {error.what}", refused) for each in gone]

    def _refused(self) -> str | None:
        """The recipe key that is to go: the one that is complained of, or the last of its section."""
        try:
            Recipe.model_validate(self.told.tree)
        except pydantic.ValidationError as error:
            location = error.errors()[0]["loc"]
            where = ".".join(str(part) for part in location if location[0] == "data" or not isinstance(part, int))
            needed = re.compile(r"base\.path|method\.kind|data\.(\d+\.)?folder")
            keys = [each.to for each in reversed(self.told.carried) if not needed.fullmatch(each.to)]
            return next((key for key in keys for spelled in (key, _of_set(key, 0))
                         if where == spelled or spelled.startswith(f"{where}.") or not where), None)
        return None


def _reason(error: ValueError) -> str:
    """Why a value could not be read, in plain words."""
    return "is no text" if isinstance(error, UnicodeError) else str(error)


def accepts(key: str, value: Any) -> bool:
    """Whether a recipe may have this value, as far as it can be told without the rest of it."""
    section, _, name = key.partition(".")
    tree: dict[str, dict[str, Any]] = {"base": {"path": "x"}, "method": {"kind": "lora"}}
    try:
        make_recipe(tree | {section: tree.get(section, {}) | {name: value}})
    except UserError:
        return False
    return True


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of "train.steps", or of "method.rank" of the only method; None where it has no such key."""
    section, _, name = key.partition(".")
    number, dot, rest = name.partition(".")
    place, name = (int(number), rest) if dot and number.isdigit() else (0, name)
    tree: Any = recipe.plain().get(section) if key else None
    if isinstance(tree, list):
        tree = tree[place]
    return tree.get(name) if isinstance(tree, dict) else None


def _of_set(key: str, number: int) -> str:
    """ "data.1.folder" of "data.folder"; another key as it is."""
    section, _, name = key.partition(".")
    return f"data.{number}.{name}" if section == "data" and not name.partition(".")[0].isdigit() else key


def _tree(carried: Iterable[Carried]) -> dict[str, Any]:
    """The recipe, its sections in their order; sets of pictures as a list where there are several."""
    tree: dict[str, dict[str, Any]] = {section: {} for section in Recipe.model_fields}
    sets: dict[int, dict[str, Any]] = {}
    for each in carried:
        section, _, name = each.to.partition(".")
        number, dot, rest = name.partition(".")
        if section == "data" and dot and number.isdigit():
            sets.setdefault(int(number), {})[rest] = each.becomes
        else:
            tree[section][name] = each.becomes
    made: dict[str, Any] = {section: values for section, values in tree.items() if values}
    if sets:
        made["data"] = [tree["data"], *(sets[number] for number in sorted(sets))]
    return {section: made[section] for section in Recipe.model_fields if section in made}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys; an empty table and a list are values."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
