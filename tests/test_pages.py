"""The pages name code, files, headings and contracts that are there; so does the code that cites the pages."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ROOMS = ("apprentice", "benchmarks", "deploy", "docs", "examples", "flows", "mlflow", "serving", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

NAMED = re.compile(r"`([\w./-]+\.py):([A-Za-z_][\w.]*)`")
PLACE = re.compile(rf"`((?:{'|'.join(ROOMS)})/[\w./-]*)[:`]")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", flags=re.MULTILINE | re.DOTALL)
CITED = re.compile(r'(?<![\w/])(docs/[\w/-]+\.md)(?:, "([^"]+)")?')


def called(page: Path) -> str:
    return str(page.relative_to(ROOT))


@lru_cache
def names_in(path: Path) -> frozenset[str]:
    """What a module defines: functions, classes and constants, and the members of its classes as `Class.member`."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for one in body:
            match one:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    yield prefix + name
                case ast.ClassDef(name=name, body=inner):
                    yield prefix + name
                    yield from walk(inner, f"{prefix}{name}.")
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.TypeAlias(name=ast.Name(id=name)):
                    yield prefix + name
                case ast.Assign(targets=targets):
                    yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))
                case _:
                    pass

    return frozenset(walk(ast.parse(path.read_text(encoding="utf-8")).body, ""))


@lru_cache
def anchors_of(page: Path) -> frozenset[str]:
    """The fragments under which GitHub and the docs site show a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+?)\s*$", text, flags=re.MULTILINE)
    return frozenset(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)


def test_names_are_found_where_they_are_and_nowhere_else() -> None:
    """The look-up sees functions, classes, members and constants."""
    here = names_in(Path(__file__))
    assert {"names_in", "ROOT", "test_names_are_found_where_they_are_and_nowhere_else"} <= here
    assert {"Router", "Router.run", "Router._planned", "STORE_GRACE_S"} <= names_in(_module("router.py"))
    assert "Router.walk" not in names_in(_module("router.py"))


def _module(name: str) -> Path:
    (found,) = (ROOT / "apprentice").rglob(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_whatever_a_page_names_exists(page: Path) -> None:
    """`file.py:name` is defined there, and a path into one of the rooms is one; NAME stands for a name to be chosen."""
    text = page.read_text(encoding="utf-8")
    missing = [
        f"{file}:{name}"
        for file, name in NAMED.findall(text)
        if not (ROOT / file).is_file() or name not in names_in(ROOT / file)
    ]
    missing += [place for place in PLACE.findall(text) if "NAME" not in place and not (ROOT / place).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file in the repository and, with a fragment, to a heading in it."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, fragment = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors_of(target)):
            broken.append(link)
    assert broken == []


def test_the_architecture_page_has_the_three_walks_every_room_and_every_contract() -> None:
    """Each walk is told in steps through the code; each contract is named in its own words."""
    walks = {part.partition("\n")[0]: part for part in ARCHITECTURE.split("\n## ")[1:]}
    for title in ("A request", "A comparison", "A training run"):
        assert len(NAMED.findall(walks[title])) >= 10, title
    packages = {f"`{path.parent.relative_to(ROOT)}/`" for path in (ROOT / "apprentice").rglob("__init__.py")}
    assert {name for name in packages if name not in walks["The rooms"]} == set()
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    told = " ".join(walks["The rooms"].split())
    assert [contract["name"] for contract in linter["contracts"] if contract["name"] not in told] == []


def test_code_cites_pages_that_are_there() -> None:
    """What a comment or an error message calls docs/PAGE.md, "Heading" is such a page with such a heading."""
    cited = {
        (str(file.relative_to(ROOT)), page, heading)
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        if file != Path(__file__)
        for page, heading in CITED.findall(re.sub(r"\n[ #]*", " ", file.read_text(encoding="utf-8")))
    }
    assert len(cited) >= 5
    broken = []
    for file, name, heading in cited:
        page, anchor = ROOT / name, heading.lower().replace(" ", "-")
        if not page.is_file() or (heading and anchor not in anchors_of(page)):
            broken.append((file, name, heading))
    assert broken == []


def test_nothing_cites_a_document_that_is_not_in_the_repository() -> None:
    """The design that this was built from lies elsewhere: what is to be read of it stands in docs/."""
    word = "DESIGN"
    files = [*PAGES, *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    citing = [called(file) for file in files if re.search(rf"\b{word}\b", file.read_text(encoding="utf-8"))]
    assert [name for name in citing if name != called(Path(__file__))] == []


def site() -> dict[str, Any]:
    """mkdocs.yml, an environment variable in it read as its default."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])
    settings: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    return settings


def test_the_site_shows_every_page() -> None:
    """Whatever lies in docs/ is in the navigation, once."""

    def pages(of: list[Any]) -> Iterator[str]:
        for one in of:
            below = next(iter(one.values())) if isinstance(one, dict) else one
            yield from [below] if isinstance(below, str) else pages(below)

    docs = ROOT / "docs"
    assert sorted(pages(site()["nav"])) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))


@pytest.mark.parametrize(
    ("link", "known", "unknown"),
    [
        ("[why](trust.md#whose-trust)", "[why](trust.md#whose-trust)", "[why](trust.md#whose-trust)"),
        ("[it](../serving/app.py)", "[it](https://git.example/a/b/blob/HEAD/serving/app.py)", "it"),
        ("![a picture](../apprentice/x.png)", "![a picture](../apprentice/x.png)", "![a picture](../apprentice/x.png)"),
    ],
)
def test_on_the_site_links_to_code_lead_to_the_repository(link: str, known: str, unknown: str) -> None:
    """If its address is known; else their text stays. What lies in docs/ is linked as it stands."""
    hook = load_hook()
    assert hook.rewritten(link, "trust.md", "https://git.example/a/b/") == known
    assert hook.rewritten(link, "trust.md", "") == unknown


def test_a_page_in_a_folder_of_docs_reaches_the_rest_of_docs_and_the_repository() -> None:
    """Links are read from where the page lies."""
    link = "[a](../trust.md) [b](../../LICENSE)"
    written = load_hook().rewritten(link, "decisions/0001.md", "https://git.example/a/b")
    assert written == "[a](../trust.md) [b](https://git.example/a/b/blob/HEAD/LICENSE)"


def load_hook() -> Any:
    (place,) = site()["hooks"]
    spec = importlib.util.spec_from_file_location("links", ROOT / place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
