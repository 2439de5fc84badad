"""A recipe: what to fine-tune, on what, how, and where to; read from TOML, checked before anything is loaded.

Each key says its unit and whose practice its default follows; unknown keys are errors that name the nearest
known one. Methods and objectives bring their own keys: their sections are checked by the registry.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, SerializeAsAny

from impasto.core.errors import UserError, nearest
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.sets import DataSets, one_or_several
from impasto.methods import METHODS
from impasto.methods.base import MethodOptions
from impasto.objectives import OBJECTIVES
from impasto.objectives.base import ObjectiveOptions
from impasto.training.frugal import check_means
from impasto.training.optimizers import OPTIMIZERS
from impasto.training.overrides import apply_override
from impasto.training.sections import BaseOptions, OutputOptions, SampleOptions, Section, TrainOptions

#: the recipes that ship with the package, by name
READY = Path(__file__).parent.parent / "recipes"


def _method(section: Any) -> MethodOptions:
    """Check a `[[method]]` section by the options of its kind."""
    if isinstance(section, MethodOptions):
        return section
    if not isinstance(section, dict) or "kind" not in section:
        raise ValueError(f"needs a kind, one of: {', '.join(METHODS)}")
    return METHODS.get(section["kind"]).Options.model_validate(section)


def _objective(section: Any) -> ObjectiveOptions:
    """Check the `[objective]` section by the options of its kind."""
    if isinstance(section, ObjectiveOptions):
        return section
    return OBJECTIVES.get(section.get("kind", "denoise")).Options.model_validate(section)


AnyMethod = Annotated[SerializeAsAny[MethodOptions], pydantic.BeforeValidator(_method)]
AnyObjective = Annotated[SerializeAsAny[ObjectiveOptions], pydantic.BeforeValidator(_objective)]


class Recipe(Section):
    """All of it. `[base]` and `[method]` are needed always, `[data]` to train; `[[data]]` several times is several
    sets of pictures."""

    base: BaseOptions
    data: DataOptions | DataSets | None = None
    prior: PriorOptions | None = None
    method: list[AnyMethod] = Field(min_length=1)
    objective: AnyObjective = Field(default_factory=lambda: _objective({}))
    train: TrainOptions = TrainOptions.model_validate({})
    validation: ValidationOptions = ValidationOptions.model_validate({})
    sample: SampleOptions = SampleOptions.model_validate({})
    output: OutputOptions = OutputOptions.model_validate({})

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _one_set_or_several(cls, value: Any) -> Any:
        return one_or_several(value)

    @pydantic.field_validator("method", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @pydantic.model_validator(mode="after")
    def _one_artifact(self) -> Recipe:
        whole = [method.kind for method in self.method if METHODS.get(method.kind).in_place]
        if whole and len(self.method) > 1:
            raise ValueError(f"{whole[0]} leaves a whole base behind and cannot be joined with other methods")
        if whole and self.output.format not in ("auto", "diffusers", "delta"):
            raise ValueError(f"{whole[0]} leaves a whole base behind: output.format is diffusers, or delta for what "
                             f"has changed in it, not {self.output.format}")
        if self.output.format == "delta" and not whole:
            raise ValueError(f"output.format = \"delta\" is of what full leaves; {self.method[0].kind} leaves an "
                             "adapter already: take auto")
        if self.output.format == "delta" and self.base.init == "random":
            raise ValueError("random weights come from no file that a delta could be told from: output.format is "
                             "diffusers")
        if self.output.format == "delta" and self.base.adapters:
            raise ValueError("a delta is told from the base's file, which does not hold base.adapters: output.format "
                             "is diffusers")
        unfit = [method.kind for method in self.method
                 if not whole and self.output.format not in ("auto", *METHODS.get(method.kind).formats)]
        if unfit:
            raise ValueError(f"output.format = \"{self.output.format}\" has no place for what {unfit[0]} leaves "
                             "behind: leave it out, and each kind of thing gets its own file")
        return self

    @pydantic.model_validator(mode="after")
    def _recommended_rates(self) -> Recipe:
        """A method's own rate counts where the recipe names none, so that it says all that it means."""
        entry = OPTIMIZERS.get(self.train.optimizer)
        if entry is not None and not entry.adaptive and "learning_rate" not in self.train.model_fields_set:
            for method in self.method:
                if method.learning_rate is None and method.recommended is not None:
                    method.learning_rate = method.recommended * (entry.rate / 1e-4)
        return self

    @pydantic.model_validator(mode="after")
    def _of_one_world(self) -> Recipe:
        drawn = self.data is not None and any(one.source == "world" for one in self.data.sets)
        if drawn and self.validation.folder is not None:
            raise ValueError("the drawn world draws its held-out pictures too: leave validation.folder out")
        return self

    @pydantic.model_validator(mode="after")
    def _masks_are_looked_at(self) -> Recipe:
        masked = self.data is not None and any(one.mask != "none" for one in self.data.sets)
        if masked and "masks" not in OBJECTIVES.get(self.objective.kind).reads:
            raise ValueError(f"objective {self.objective.kind} looks at no masks: leave data.mask out")
        return self

    @pydantic.model_validator(mode="after")
    def _class_pictures_are_of_words(self) -> Recipe:
        paired = self.data is not None and any(one.pairs != "none" for one in self.data.sets)
        if paired and self.prior is not None:
            raise ValueError("class pictures are made of no other pictures: leave [prior] out where there are "
                             "data.pairs, or put pairs of the class into a set of their own")
        return self

    @pydantic.model_validator(mode="after")
    def _means_that_save_memory(self) -> Recipe:
        check_means(self)
        return self

    @pydantic.model_validator(mode="after")
    def _has_a_teacher(self) -> Recipe:
        whole = [method.kind for method in self.method if METHODS.get(method.kind).in_place]
        if whole and OBJECTIVES.get(self.objective.kind).needs_teacher:
            raise ValueError(f"objective {self.objective.kind} asks the frozen base, and {whole[0]} trains the base "
                             "itself, of which no second one is held: use class pictures instead (prior.caption)")
        return self

    def plain(self) -> dict[str, Any]:
        """Every key with its value, JSON-able: for manifests and metadata."""
        return self.model_dump(mode="json")


class DataSections(Section):
    """The sections of a recipe that tell of its pictures; the others are not looked at."""

    model_config = pydantic.ConfigDict(extra="ignore")

    data: DataOptions | DataSets | None = None
    prior: PriorOptions | None = None
    train: TrainOptions = TrainOptions.model_validate({})

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _one_set_or_several(cls, value: Any) -> Any:
        return one_or_several(value)


# --- reading -----------------------------------------------------------------------------------------------


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, or the ready one of that name, with `section.key=value` overrides.

    Raises `UserError` for a missing file, bad TOML, an unknown key (naming the nearest) or a value out of range.
    """
    path, tree = read_tree(name)
    for override in overrides:
        apply_override(tree, override)
    return make_recipe(tree, where=path)


def load_data_sections(name: str, overrides: Sequence[str] = ()) -> DataSections:
    """What a recipe, a folder of pictures or shards tell of the pictures; whatever else the recipe holds or lacks.

    Asks for no torch, as methods and objectives do. Raises `UserError` as `load_recipe` does.
    """
    where: object = name
    if Path(name).is_dir() or name.startswith("mini:") or name.endswith(".tar"):
        tree: dict[str, Any] = {"data": {"source": "shards", "shards": name} if name.endswith(".tar") else
                                {"folder": name}}
        for override in overrides:
            apply_override(tree, override)
    else:
        try:
            where = find_recipe(name)
        except UserError as error:
            raise UserError(f"no such folder, {error.what}", where=error.where, fix=error.fix) from None
        tree = read_tree(name)[1]
        for override in overrides:
            apply_override(tree, override)
    for section in tree:
        if section not in Recipe.model_fields:
            raise UserError(f"unknown key {section!r}", where=where, fix=nearest(section, Recipe.model_fields))
    try:
        return DataSections.model_validate(tree)
    except pydantic.ValidationError as error:
        raise _first_problem(error, tree, where) from None


def read_tree(name: str) -> tuple[Path, dict[str, Any]]:
    """Where the recipe of that name lies, and what is in it, not yet checked. Raises `UserError` as `load_recipe`."""
    path = find_recipe(name)
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"is not valid TOML ({error})", where=path, fix="the README has a short recipe") from None


def find_recipe(name: str) -> Path:
    """A file of that path, or the ready recipe of that name."""
    path = Path(name)
    if path.is_file():
        return path
    ready = READY / f"{name}.toml"
    if ready.is_file():
        return ready
    known = [p.relative_to(READY).with_suffix("").as_posix() for p in READY.rglob("*.toml")]
    raise UserError("no such recipe file, and no ready recipe of that name", where=name, fix=nearest(name, known))


def make_recipe(tree: dict[str, Any], *, where: object = "recipe") -> Recipe:
    """Check a nested dictionary; the first thing wrong is the one line of the `UserError`."""
    try:
        return Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise _first_problem(error, tree, where) from None


def _first_problem(error: pydantic.ValidationError, tree: dict[str, Any], where: object) -> UserError:
    """Pydantic's first complaint as one line, an unknown key with the nearest known one."""
    problems = error.errors()  # a typo comes first: it is why the key that was meant seems to be missing
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = list(problem["loc"])
    dotted = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _siblings(location, tree)
        return UserError(f"unknown key {dotted!r}", where=where, fix=nearest(str(location[-1]), known))
    if problem["type"] == "missing":
        return UserError(f"{dotted!r} is missing", where=where, fix=f"add it, or say {dotted}=… on the command line")
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    tables = isinstance(given, list) and any(isinstance(item, dict) for item in given)
    shown = "" if isinstance(given, dict) or tables else f" (got {given!r})"
    return UserError(f"{dotted}: {message}{shown}" if dotted else message, where=where)


def _siblings(location: list[Any], tree: dict[str, Any]) -> set[str]:
    """The keys that are known at the place of an unknown one."""
    section = location[0]
    if len(location) == 1:
        return set(Recipe.model_fields)
    if section == "method":
        methods = tree["method"] if isinstance(tree["method"], list) else [tree["method"]]
        return set(METHODS.get(methods[location[1]]["kind"]).Options.model_fields)
    if section == "objective":
        return set(OBJECTIVES.get(tree["objective"].get("kind", "denoise")).Options.model_fields)
    models = {"base": BaseOptions, "data": DataOptions, "prior": PriorOptions, "train": TrainOptions,
              "validation": ValidationOptions, "sample": SampleOptions, "output": OutputOptions}
    return set(models[section].model_fields)
