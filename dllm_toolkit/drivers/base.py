"""The plug-in contract of drivers: how decodes compose into a generation.

A decoder is one step; a driver says what is done with steps. The default, `denoise`, is `decode()`. Others bring a second model
(`deer`) or a second decode (`staged`). A driver keeps no loop of its own: it calls `decode`, or `decode.start` and `decode.loop` around
another step, so that prompts, progress limits and the account stay as they are everywhere else.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decode import Output, Template, decode
from dllm_toolkit.decoders.base import DecodeError, Decoder, check
from dllm_toolkit.models.base import Model
from dllm_toolkit.recipe_hints import Lazy
from dllm_toolkit.registry import declare, register

if TYPE_CHECKING:
    from dllm_toolkit.state import State


class Driver(abc.ABC):
    """How steps become a generation.

    `cite`: arXiv numbers. `lossless`: the text (its distribution, if sampled) is that of `decode` with the same decoder. `other_models`:
    arguments that hold another model, `Lazy[Model] | str`: a recipe of its own, or in a comparison a name under `models`.
    """

    cite: ClassVar[tuple[str, ...]] = ()
    lossless: ClassVar[bool] = False
    other_models: ClassVar[tuple[str, ...]] = ()

    @property
    def others(self) -> dict[str, Lazy[Model] | str]:
        """The other models that this driver asks, by argument."""
        return {name: getattr(self, name) for name in self.other_models}

    def with_models(self, models: Mapping[str, Model]) -> Driver:
        """The same driver with loaded models in place of their recipes or names."""
        changes = {name: Lazy.of(model) for name, model in models.items()}
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]

    def other(self, name: str) -> Model:
        """One of the other models. Raises DecodeError for a name that nobody has looked up."""
        found = self.others[name]
        if isinstance(found, str):
            raise DecodeError(
                f"{name} names a model, got {found!r}. Only a comparison knows models by name. Write the model itself: "
                f"{name}: {{_component_: load, path: ...}}."
            )
        return found.build()

    def check(self, model: Model, decoder: Decoder, cache: Cache) -> None:
        """Do they fit? Raises DecodeError. The driver has its other models in place."""
        check(model.spec, decoder, cache)

    @abc.abstractmethod
    def run(
        self,
        model: Model,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        templates: Sequence[Template] | None = None,
        cache: Cache | None = None,
        seed: int | Sequence[int] = 0,
        max_steps: int | None = None,
        compile: bool = False,
        callback: Callable[[State], None] | None = None,
        throw: bool = True,
    ) -> Output:
        """Answers for a batch of prompts. Arguments, result and errors are those of `decode`."""


declare("driver", Driver)


def with_loaded(driver: Driver, load: Callable[[str, Lazy[Model] | str], Model]) -> Driver:
    """`driver` with its other models in place; `load(argument, recipe or name)` gives each."""
    return driver.with_models({name: load(name, found) for name, found in driver.others.items()})


@register("driver", "denoise")
@dataclass(frozen=True)
class Denoise(Driver):
    """Step until nobody is left: `decode()`, the driver of every configuration that names none."""

    lossless = True

    def run(
        self,
        model: Model,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        templates: Sequence[Template] | None = None,
        cache: Cache | None = None,
        seed: int | Sequence[int] = 0,
        max_steps: int | None = None,
        compile: bool = False,
        callback: Callable[[State], None] | None = None,
        throw: bool = True,
    ) -> Output:
        return decode(
            model,
            decoder,
            prompts,
            max_new_tokens=max_new_tokens,
            templates=templates,
            cache=cache,
            seed=seed,
            max_steps=max_steps,
            compile=compile,
            callback=callback,
            throw=throw,
        )
