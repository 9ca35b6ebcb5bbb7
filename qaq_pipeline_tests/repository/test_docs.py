"""docs: pages that say what the code says, names that exist, commands that run, a site that fetches nothing."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import dataframely as dy
import pytest
import yaml
from pydantic import Field, create_model

from docs import generate
from qaq_pipeline.automation import sensors
from qaq_pipeline.config.load import load_settings, parse_settings
from qaq_pipeline.config.settings import ReferenceSettings, Settings
from qaq_pipeline.orchestration import checks
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema import tables, vocabularies
from qaq_pipeline_tests.conftest import delivered_rows, write_jsonl

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "qaq_pipeline"
DOCS = REPOSITORY / "docs"
PAGES = sorted([REPOSITORY / "README.md", *DOCS.rglob("*.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]


# --- generated pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_say_what_the_code_says(name: str) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page == generate.filled(page, generate.PAGES[name]()), "out of date: run `make docs`, and commit the pages"


def test_a_new_column_changes_the_page_of_tables() -> None:
    class Wider(tables.RawData):
        reviewer = dy.Float64(nullable=True, max=3, metadata={"unit": "stars"}, description="Who <looked> | at it.")

    row = "| `reviewer` | Float64, stars, ≤\N{NO-BREAK SPACE}3 | yes | Who &lt;looked> \\| at it. |"
    assert row in generate.tables({"raw_data": Wider})
    assert row not in generate.tables()


def test_a_new_setting_changes_the_page_of_settings() -> None:
    class Wider(Settings):
        colour: int = Field(3, ge=1, le=9, description="Of nothing.")

    row = "| `colour` | whole number from 1 to 9 | `3` | Of nothing. |"
    assert row in generate.settings(Wider)
    assert row not in generate.settings()


VALUES: list[tuple[Any, str]] = [
    (float | None, "number, or `null`"),
    (tuple[float, float], "list of 2 numbers"),
    (tuple[float | None, float | None] | None, "list of 2 (each a number or `null`), or `null`"),
    (Annotated[float, Field(gt=0, le=1)] | None, "number >\N{NO-BREAK SPACE}0 and ≤\N{NO-BREAK SPACE}1, or `null`"),
    (Literal["a", "b", "c"], "`a`, `b` or `c`"),
    (Literal["a", "b"] | tuple[str, ...], "`a` or `b`, or list of text"),
    (Annotated[tuple[Literal["a", "b"], ...], Field(min_length=1)], "non-empty list of any of `a`, `b`"),
    (tuple[Annotated[str, Field(pattern="^[a-z]$")], ...], "list of text that matches `^[a-z]$`"),
    (ReferenceSettings | None, "[`ranking.reference`](#rankingreference), or `null`"),
    (tuple[ReferenceSettings, ...], "list of [`ranking.reference`](#rankingreference)"),
]


@pytest.mark.parametrize(("annotation", "said"), VALUES, ids=[said for _, said in VALUES])
def test_what_may_stand_in_a_field_is_said_in_words(annotation: Any, said: str) -> None:
    model = create_model("Wider", __base__=Settings, field=(annotation, Field(description="Of nothing.")))
    assert f"| `field` | {said} | required | Of nothing. |" in generate.settings(model)


def test_every_field_of_the_settings_is_on_the_page() -> None:
    page = generate.settings()
    models = Settings.model_json_schema()["$defs"]
    fields = [(model, name) for model, one in models.items() for name in one.get("properties", {})]
    missing = [(model, name) for model, name in fields if f"| `{name}` |" not in page]
    assert missing == []
    assert not re.search(r"\| *\|", page), "a cell is empty: a field without a description"


def test_every_word_of_a_vocabulary_has_its_meaning_on_the_page() -> None:
    page = generate.tables()
    for vocabulary in vocabularies.Vocabulary.__subclasses__():
        for word in vocabulary:
            assert word == word.value
            assert re.search(rf"^\| `{word.value}` \| \S.*\. \|$", page, re.MULTILINE), word


def test_every_declared_table_is_on_the_page() -> None:
    declared = {one for one in vars(tables).values() if isinstance(one, type) and issubclass(one, dy.Schema)}
    public = {one for one in declared if one.__module__ == tables.__name__ and not one.__name__.startswith("_")}
    assert public == {*PIPELINE.tables().values(), *(table for table, _ in generate.OTHER_FILES.values())}


def test_a_page_without_its_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="generated"):
        generate.filled("# Settings", "content")


# --- names in pages -----------------------------------------------------------------------------------------------


_FENCED = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def _code(page: Path) -> Iterator[str]:
    """Every inline code span, and every line of a fenced or indented block, without its comment."""
    text = page.read_text(encoding="utf-8")
    prose = _FENCED.sub("", text)
    for block in (*_FENCED.findall(text), "\n".join(re.findall(r"^ {4}(.*)$", prose, re.MULTILINE))):
        yield from (line.partition(" # ")[0].strip() for line in block.splitlines())
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))


def _qaq_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Command and options of every `qaq …` in the code of a page."""
    for code in _code(page):
        found = re.match(r"(?:\$ )?qaq ([a-z]+)\b(.*)", code)
        if found:
            yield found[1], re.findall(r"(?<!\S)--?[a-z][a-z-]*", found[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_and_options_in_pages_exist(page: Path) -> None:
    commands = generate.console_commands()
    for name, options in _qaq_commands(page):
        known = {option for one in getattr(commands.get(name), "params", ()) for option in one.opts}
        assert name in commands, f"{page.name}: no command `qaq {name}`"
        assert set(options) <= known, f"{page.name}: `qaq {name}` has no {sorted(set(options) - known)}"


def test_pages_name_commands() -> None:
    named = {name for page in PAGES for name, _ in _qaq_commands(page)}
    assert named >= {"run", "explain", "withdraw", "refresh"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_make_targets_in_pages_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for code in _code(page) for name in re.findall(r"(?:^|; )make ([a-z][a-z-]*)", code)}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_that_pages_link_to_or_name_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    linked = [page.parent / link for link in links if "://" not in link]
    folders = r"(?:qaq_pipeline|qaq_pipeline_tests|docs|bench|examples)"
    named = [
        REPOSITORY / name for code in _code(page) for name in re.findall(rf"(?<![\w./]){folders}/[\w./-]*\w", code)
    ]
    built = DOCS / "_build"
    missing = [path for path in [*linked, *named] if not path.is_relative_to(built) and not _is_there(path)]
    assert missing == []


def _is_there(path: Path) -> bool:
    """Decisions may be named by their number alone."""
    return path.exists() or any(path.parent.glob(f"{path.name}-*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_settings_in_pages_can_be_used(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^( *)```yaml\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
        values = yaml.safe_load(block[1])
        models = {"models": {role: {"hub": "some/model"} for role in ("strong", "weak")}}
        parse_settings(yaml.safe_dump(models | values), str(page))


def test_every_check_gate_and_sensor_is_in_the_operating_guide() -> None:
    guide = (DOCS / "operating.md").read_text(encoding="utf-8")
    settings = load_settings("demo")
    ranking = settings.ranking.model_validate({"reference": {"name": "r", "batches": ["b"]}})
    definitions = checks.build_checks(settings.model_copy(update={"ranking": ranking}))
    names = {spec.name for one in definitions for spec in one.check_specs}
    names |= {reason.value for reason in vocabularies.GateReason}
    built = sensors.build_automation(settings)
    names |= {one.name for one in (*(built.sensors or ()), *(built.schedules or ()))} - {"curation"}
    assert [name for name in sorted(names) if f"`{name}`" not in guide] == []


def test_every_place_in_the_storage_is_in_the_operating_guide() -> None:
    guide = (DOCS / "operating.md").read_text(encoding="utf-8")
    sources = [
        ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) for path in PACKAGE.rglob("*.py")
    ]
    places = {
        place for source in sources for place in re.findall(r"(?m)^ *([a-z_]+(?:/(?=<)|\.json(?= )))", source or "")
    }
    assert len(places) > 8
    places = {place.rstrip("/") for place in places}
    assert [place for place in sorted(places) if f"<storage>/{place}" not in guide] == []


def test_every_decision_is_in_their_index() -> None:
    index = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    assert [note.name for note in sorted((DOCS / "decisions").glob("0*.md")) if f"]({note.name})" not in index] == []


# --- the site -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning, such as of a link that leads nowhere, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(folder / "doctrees")]
    run = subprocess.run([*command, str(DOCS), str(folder / "html")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder / "html"


def test_the_site_has_every_page(site: Path) -> None:
    pages = [page.relative_to(DOCS).with_suffix(".html") for page in PAGES if page.is_relative_to(DOCS)]
    assert [page for page in pages if not (site / page).exists()] == []


def test_the_site_asks_nothing_of_the_outside(site: Path) -> None:
    elsewhere = r"""=["']?(?:https?:)?//"""
    fetched = re.compile(rf"<(?:script|img|iframe|source)[^>]*\ssrc{elsewhere}|<link[^>]*\shref{elsewhere}")
    imported = re.compile(r"""url\(["']?(?:https?:)?//|@import\s+["'](?:https?:)?//""")
    for path in site.rglob("*.html"):
        assert not fetched.search(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.css"):
        assert not imported.search(path.read_text(encoding="utf-8")), path


# --- the cookbook -------------------------------------------------------------------------------------------------


def _blocks(page: Path, language: str, mark: str = "") -> list[str]:
    pattern = rf"^{re.escape(mark)}```{language}\n(.*?)^```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_cookbook_runs(
    settings_for: Callable[..., Settings], settings_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Run its marked commands in order, then its fine-tune, on twenty rows and with tiny models."""
    selections = [{"name": "diff_high", "strategy": "diff_high"}, {"name": "tenth", "strategy": "random"}]
    settings = settings_for(selections=selections, scoring={"quantities": ["rmi"]})
    write_jsonl(tmp_path / "pairs.jsonl", delivered_rows() * 2)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    shutil.copy(Path(sys.executable).with_name("qaq"), bin_folder)
    environment = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "QAQ_CONFIG": str(settings_file(settings)),
        "QAQ_HOME": str(settings.home),
    }
    commands = _blocks(DOCS / "cookbook.md", "sh", mark="<!-- run -->\n")
    assert len(commands) > 3
    _run(["bash", "-euxc", "\n".join(commands)], environment, tmp_path)

    looks, train = (
        next(block for block in _blocks(DOCS / "cookbook.md", "python") if word in block)
        for word in ("decisions.parquet", "SFTTrainer")
    )
    _run([sys.executable, "-c", looks], environment, tmp_path)
    pytest.importorskip("trl")
    model = settings.models["strong"].directory
    assert model is not None
    _run([sys.executable, "-c", train, model, "diff_high", "1"], environment, tmp_path)
    assert (tmp_path / "tuned-diff_high-1" / "model.safetensors").exists()


def _run(command: list[str], environment: dict[str, str], folder: Path) -> None:
    run: subprocess.CompletedProcess[Any] = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{shlex.join(command)}\n{run.stdout}\n{run.stderr}"
