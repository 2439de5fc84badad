"""What a method of fine-tuning is to the loop: what it trains and what it leaves behind.

A run holds a list of methods. A method never touches the loop; the loop never asks which one it is.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

from impasto.core.errors import UserError

if TYPE_CHECKING:  # a recipe is checked without torch: what options need is imported here, the rest where it is used
    from torch import Tensor, nn

    from impasto.deltas.adapter import Adapter
    from impasto.deltas.attach import Switched
    from impasto.families.base import Base


class MethodOptions(pydantic.BaseModel):
    """A `[[method]]` section. Each method subclasses it with its own keys; `kind` picks the subclass."""

    model_config = pydantic.ConfigDict(extra="forbid")

    #: rate where the recipe says none at all, neither here nor in [train], beside AdamW's of 1e-4; None: that one
    recommended: ClassVar[float | None] = None

    kind: str
    learning_rate: float | None = pydantic.Field(
        None, gt=0, description="Rate of this method's weights; default: train.learning_rate.")


def check_method(method: Method, base: Base) -> None:
    """Raises `UserError` for a method that the base's family refuses, and for options that do not fit the base."""
    if (why := base.refuses.get(method.options.kind)) is not None:
        raise UserError(f"a base of the family {base.family} cannot be trained so: {why}",
                        where=f"method {method.options.kind}", fix="train a LoRA")
    method.check(base)


class Method(abc.ABC):
    """One way of fine-tuning, on one base."""

    Options: ClassVar[type[MethodOptions]]
    #: whether the base's own weights are trained: what is left behind is then a whole base, not an adapter
    in_place: ClassVar[bool] = False
    #: how the name of an adapter's file ends if this method alone leaves something in it
    suffix: ClassVar[str] = ".safetensors"
    #: formats beside auto that hold what it leaves behind (names as in formats.adapters.CODECS)
    formats: ClassVar[tuple[str, ...]] = ("kohya", "diffusers", "peft")

    def __init__(self, options: Any) -> None:
        self.options = options

    def check(self, base: Base) -> None:  # noqa: B027 - most methods need none
        """Raises `UserError` for options that do not fit the base, before pictures are encoded: that may take hours."""

    @abc.abstractmethod
    def prepare(self, base: Base, seed: int) -> list[dict[str, Any]]:
        """Put the trainable weights in place. Returns torch parameter groups ("params", "lr" or None, "name").

        A group's "paths", one for each of its params, say where in the base these are ("unet.down_blocks.0…"), so that
        `train.rates` finds them; without them the group's name stands for all.
        Called once, after every weight of the base has been frozen. Initial values are a function of `seed`
        and of the layer's path. Raises `UserError` for options that do not fit the base and that `check` has let pass.
        """

    @abc.abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """What is trained, by name: what a checkpoint saves and a resumed run loads."""

    @abc.abstractmethod
    def trains(self, base: Base) -> frozenset[str]:
        """Names of the base's components in which something trains ("unet", "text_encoder"), prepared or not."""

    @abc.abstractmethod
    def adapter(self) -> Adapter | None:
        """What has been learned so far, detached, on the CPU; None for a method that trains in place."""

    def remarks(self) -> Iterable[str]:
        """Lines to tell at the start, once prepared: where an option could not be taken as it was written."""
        return ()

    def off(self) -> AbstractContextManager[None]:
        """A block in which the method, prepared, has no effect on its base, whose prediction is then what it was
        before, to the bit: a frozen teacher. A method that changes the base itself has none to go back to."""
        raise NotImplementedError(f"{type(self).__name__} cannot be switched off")

    def look(self, captions: Iterable[str]) -> None:  # noqa: B027 - most methods need none
        """Called once, after `prepare`, with what is said of the pictures, read as far as it is asked for.

        Raises `UserError` if the method could learn nothing from them.
        """

    def begin(self, total: int) -> None:  # noqa: B027 - most methods need none
        """The run takes `total` optimizer steps. Called once, after `prepare`, before the first of them or a resume."""

    def penalty(self) -> Tensor | None:
        """A regulariser added to the loss, or None."""
        return None

    def after_step(self, step: int) -> None:  # noqa: B027 - most methods need none
        """Projections, norm limits and the like, after optimizer step `step`."""

    def resting(self, step: int) -> Iterable[nn.Parameter]:
        """Those of its parameters that do not train at optimizer step `step` (from 0)."""
        return ()


def group_of(module: nn.Module, path: str, name: str, lr: float | None = None) -> dict[str, Any]:
    """A parameter group of all that a module at `path` holds."""
    named = dict(module.named_parameters(prefix=path))
    return {"params": list(named.values()), "paths": list(named), "lr": lr, "name": name}


@contextlib.contextmanager
def switched_off(*parts: Switched) -> Iterator[None]:
    """A block in which what is attached to a base has no effect; afterwards it has as before."""
    before = [part.enabled for part in parts]
    try:
        for part in parts:
            part.enabled = False
        yield
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled


@contextlib.contextmanager
def all_off(methods: Iterable[Method]) -> Iterator[None]:
    """A block in which none of the methods has any effect."""
    with contextlib.ExitStack() as stack:
        for method in methods:
            stack.enter_context(method.off())
        yield
