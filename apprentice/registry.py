"""What a name in apprentice.yaml stands for: something of ours, or something that another installed package brings.

Six keys of the file name a class: ``remote.provider``, ``local.backend``, ``local.fine_tune_backend``, a task's
``evaluator``, ``sampling.decay_function`` and ``alerts.sinks``. Ours are files named like the thing, in one folder for
each kind (a line in one table for decay functions and sinks). Others come by entry point (`GROUPS` below;
https://packaging.python.org/specifications/entry-points/). Installed packages are looked at only for a name that is not
ours, and for lists of all names; their code is imported when their name is used.

Modules are found by their names, never imported from here: the settings can ask what is known without standing on the
rooms that make it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from apprentice.errors import ApprenticeError, Problem

__all__ = [
    "DECAY",
    "ENGINES",
    "EVALUATORS",
    "KINDS",
    "OURS",
    "PROVIDERS",
    "SINKS",
    "TRAINERS",
    "Found",
    "Plugin",
    "Registry",
    "RegistryError",
]

OURS = "apprentice-llm"
type Load = Callable[[], Any]


class Plugin:
    """What a registered class says of itself; each kind's own base class adds how it is made."""

    Options: ClassVar[type[BaseModel] | None] = None
    """The settings section of its own; None if it takes none."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What it imports on first use; `apprentice check` looks for them."""
    extra: ClassVar[str] = ""
    """The extra of ours that brings ``packages``."""
    environment: ClassVar[tuple[str, ...]] = ()
    """Environment variables that must be set."""
    is_paid: ClassVar[bool] = False
    """Whether a vendor sends a bill for what it does. A replay refuses it."""


class RegistryError(ApprenticeError):
    """A name that stands for nothing usable, or options that do not fit. ``problems`` have paths below the section."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(str(one).removeprefix(": ") for one in problems))


@dataclass(frozen=True, slots=True)
class Found:
    """What a name stands for: a class made from `Plugin`, or a function where its kind takes one."""

    name: str
    made: Any
    package: str

    @property
    def model(self) -> type[BaseModel] | None:
        """The model of its options; None if it takes none."""
        model: type[BaseModel] | None = self.made.Options if self.is_class else None
        return model

    @property
    def is_class(self) -> bool:
        """Whether it is a class, to be `configured`, and not a function."""
        return isinstance(self.made, type)

    @property
    def is_ours(self) -> bool:
        """Whether it comes with Apprentice."""
        return self.package == OURS


class Registry:
    """The names of one kind.

    ``kind`` is its word in messages, ``key`` where its name stands in apprentice.yaml, ``group`` the entry points'.
    ``ours`` returns what is built in, by name, or None if that is not on this machine. ``takes_function``: a plain
    function does, too.
    """

    def __init__(
        self,
        kind: str,
        key: str,
        group: str,
        ours: Callable[[], Mapping[str, Load] | None],
        *,
        takes_function: bool = False,
    ) -> None:
        self.kind, self.key, self.group = kind, key, group
        self._find_ours = ours
        self._takes_function = takes_function

    @cached_property
    def _ours(self) -> Mapping[str, Load] | None:
        return self._find_ours()

    @property
    def is_here(self) -> bool:
        """False where the room that holds this kind is not on this machine: then no name can be called unknown."""
        return self._ours is not None

    @property
    def built_in(self) -> list[str]:
        """The names of ours."""
        return sorted(self._ours or ())

    def installed(self) -> dict[str, list[str]]:
        """What other packages bring: name -> the packages, as ``name version``. One that we have, too, is ours."""
        found: dict[str, set[str]] = {}
        for point in self._points():
            found.setdefault(point.name, set()).add(_package(point))
        return {name: sorted(packages) for name, packages in sorted(found.items())}

    def known(self) -> list[str]:
        """Every name that may be written here."""
        return sorted({*self.built_in, *self.installed()})

    def find(self, name: str) -> Found:
        """What the name stands for. Raises `RegistryError`, whose problem has no path."""
        load = (self._ours or {}).get(name)
        if load is not None:
            return Found(name, load(), OURS)
        points = [point for point in self._points() if point.name == name]
        packages = sorted({_package(point) for point in points})
        if not points:
            raise RegistryError([self._unknown(name)])
        if len(packages) > 1:
            message = f"is {name!r}, which {len(packages)} packages bring as {self._article}: {' and '.join(packages)}."
            raise RegistryError([Problem("", message, "Uninstall all but one of them.")])
        (package,), point = packages, points[0]
        its = f"is {name!r}, which {package} brings as {point.value}"
        try:
            made = point.load()
        except Exception as error:  # somebody else's module may raise anything when it is imported
            message = f"{its}, and that cannot be imported ({type(error).__name__}: {error})."
            raise RegistryError([Problem("", message, f"Mend or update {package}, or write another name.")]) from error
        is_class = isinstance(made, type) and issubclass(made, Plugin)
        fits = is_class or (self._takes_function and callable(made) and not isinstance(made, type))
        if not fits:
            wanted = f"a class made from the base class of its kind{', or a function' if self._takes_function else ''}"
            message = f"{its}, which is no {self.kind}: it must be {wanted}."
            raise RegistryError([Problem("", message, "See docs/extending.md.")])
        return Found(name, made, package)

    def options(self, found: Found, given: Mapping[str, Any], key: str) -> Any:
        """An instance of the class's ``Options``, None if it has none. ``key`` is where they stand in the section.

        Raises `RegistryError` with a problem for each mistake.
        """
        model = found.model
        if model is None:
            if given:
                message = f"has {_list(given)}, and the {self.kind} {found.name!r} takes no options."
                raise RegistryError([Problem(key, message, "Leave them out.")])
            return None
        try:
            return model.model_validate(dict(given))
        except ValidationError as error:
            raise RegistryError([_explained(one, key, model) for one in error.errors()]) from None

    def shadowed(self) -> list[str]:
        """A sentence for each entry point that is never used, because we have a thing of its name."""
        return [
            f"{' and '.join(packages)} brings {self._article} {name!r}; the built-in one is used"
            for name, packages in self.installed().items()
            if name in self.built_in
        ]

    def _unknown(self, name: str) -> Problem:
        known = self.known()
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        whence = {other: packages for other, packages in self.installed().items() if other not in self.built_in}
        listed = [f"{other} ({' and '.join(whence[other])})" if other in whence else other for other in known]
        return Problem("", f"is {name!r}, which is no {self.kind}.", f"{hint}Known: {', '.join(listed)}.")

    def _points(self) -> Iterable[importlib.metadata.EntryPoint]:
        return importlib.metadata.entry_points(group=self.group)

    @property
    def _article(self) -> str:
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"


def _package(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unnamed package"


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _explained(error: Any, key: str, model: type[BaseModel]) -> Problem:
    place = ".".join(map(str, (key, *error["loc"])) if key else map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = sorted(model.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.6)
        remedy = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known) or 'none'}."
        return Problem(place, "is not a known key.", remedy)
    cause = error.get("ctx", {}).get("error")
    message = str(cause) if cause else error["msg"]
    return Problem(place, "is missing." if error["type"] == "missing" else f"{message[:1].lower()}{message[1:]}.")


def _folder(package: str, *, besides: Collection[str] = ()) -> Callable[[], Mapping[str, Load] | None]:
    """Each module of a package is one, called as its file; its ``REGISTERED`` is the class."""

    def modules() -> Mapping[str, Load] | None:
        root, *inner = package.split(".")
        spec = importlib.util.find_spec(root)  # which imports nothing, as it would for a package inside one
        if spec is None or not spec.submodule_search_locations:
            return None
        places = [str(Path(place, *inner)) for place in spec.submodule_search_locations]
        names = [module.name for module in pkgutil.iter_modules(places) if module.name not in besides]
        return {name: _loader(f"{package}.{name}", "REGISTERED") for name in names}

    return modules


def _loader(module: str, attribute: str) -> Load:
    return lambda: getattr(importlib.import_module(module), attribute)


def _table(module: str, attribute: str) -> Callable[[], Mapping[str, Load]]:
    """A mapping of name to class or function, in the module where each of them is a few lines."""

    def entries() -> Mapping[str, Load]:
        table: Mapping[str, Any] = _loader(module, attribute)()
        return {name: _same(made) for name, made in table.items()}

    return entries


def _same(made: Any) -> Load:
    return lambda: made


PROVIDERS = Registry("provider", "remote.provider", "apprentice.providers", _folder("apprentice.remote.providers"))
ENGINES = Registry("engine", "local.backend", "apprentice.engines", _folder("apprentice.local.engines"))
TRAINERS = Registry("trainer", "local.fine_tune_backend", "apprentice.trainers", _folder("flows.trainers.backends"))
EVALUATORS = Registry(
    "evaluator",
    "tasks[].evaluator",
    "apprentice.evaluators",
    _folder("apprentice.evaluators", besides=("build", "protocol", "values")),
    takes_function=True,
)
DECAY = Registry(
    "decay function",
    "sampling.decay_function",
    "apprentice.decay",
    _table("apprentice.confidence.sampling", "CURVES"),
    takes_function=True,
)
SINKS = Registry("alert sink", "alerts.sinks", "apprentice.alerts", _table("apprentice.events.sinks", "SINKS"))

KINDS = (PROVIDERS, ENGINES, TRAINERS, EVALUATORS, DECAY, SINKS)
