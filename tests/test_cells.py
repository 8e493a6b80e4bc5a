"""Reading notebooks: broken files, parameters in every form, magics."""

import json

import pytest

from mlnb.notebooks import cells
from mlnb.project.errors import NotebookError


@pytest.fixture
def notebook(tmp_path):
    "A function that writes a notebook of (source, tags) code cells"

    def write(*sources, name="task.ipynb", **changes):
        made = [{"cell_type": "code", "source": s, "metadata": {"tags": tags}, "outputs": []} for s, *tags in sources]
        path = tmp_path / name
        path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5} | changes))
        return path

    return write


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a notebook"),
        ('{"cells": [', "is not a notebook"),
        ("[]", "is not a notebook of format 4"),
        ('{"nbformat": 4}', "is not a notebook of format 4"),
        ('{"cells": [], "nbformat": 3}', "is not a notebook of format 4"),
        ('{"cells": [{"cell_type": "code"}], "nbformat": 4}', "cell 1 has no source"),
        ('{"cells": [{"cell_type": "poem", "source": ""}], "nbformat": 4}', "no known type"),
        ("\x00\xff", "is not a notebook"),
    ],
)
def test_broken_files_are_named(tmp_path, text, says):
    path = tmp_path / "broken.ipynb"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(NotebookError, match=says) as e:
        cells.read(path)
    assert str(path) in str(e.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(NotebookError, match=r"no notebook .*absent.ipynb"):
        cells.read(tmp_path / "absent.ipynb")
    with pytest.raises(NotebookError, match="cannot be read"):
        cells.read(tmp_path)


def test_sources_as_lists_of_lines(notebook):
    path = notebook((["a = 1\n", "b = 2"], "parameters"))
    assert list(cells.parameters(path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "default", "literal"),
    [
        ("x = 1", 1, True),
        ("x: int = 1", 1, True),
        ("x = -1.5", -1.5, True),
        ("x = None", None, True),
        ("x = ['a']", ["a"], True),
        ("x = {'a': 1}", {"a": 1}, True),
        ("x = 'it''s'", "its", True),
        ("x = 1 + 1", None, False),
        ("x = f()", None, False),
    ],
)
def test_defaults(notebook, line, default, literal):
    found = cells.parameters(notebook((line, "parameters")))["x"]
    assert (found.default, found.literal) == (default, literal)


def test_parameters_cell_must_be_one(notebook):
    with pytest.raises(NotebookError, match="no parameters cell; tag one"):
        cells.parameters(notebook(("x = 1",)))
    with pytest.raises(NotebookError, match="2 cells tagged"):
        cells.parameters(notebook(("x = 1", "parameters"), ("y = 1", "parameters")))
    with pytest.raises(NotebookError, match="syntax error in line 2"):
        cells.parameters(notebook(("x = 1\ny = = 2", "parameters")))


@pytest.mark.parametrize(
    ("value", "default", "fits"),
    [
        (1, 0, True), (1.0, 0, False), (True, 0, False), ("1", 0, False),
        (1, 0.5, True), (1.5, 0.5, True), (True, 0.5, False),
        (True, False, True), (1, False, False),
        ("a", "b", True), (1, "b", False),
        ([1], [], True), ((1,), [], True), ("a", [], False),
        ({}, {"a": 1}, True), ([], {}, False),
        ("anything", None, True), (None, 3, True),
    ],
)  # fmt: skip
def test_forms(value, default, fits):
    assert (cells.same_form("x", value, default) is None) is fits


@pytest.mark.parametrize(
    ("line", "value", "given"),
    [
        ("x: float = 0", 0.5, 0.5),
        ("x: float = 0", 1, 1.0),
        ("x: float = 0", True, TypeError),
        ("x: float = 0", None, TypeError),
        ("x: float = None", None, None),
        ("x: int = 0", 1.0, TypeError),
        ("x: int = 0", True, TypeError),
        ("x: bool = True", 1, TypeError),
        ("x: str = 0", "a", "a"),
        ("x: str = ''", 1, TypeError),
        ("x: 'float' = 0", 2, 2.0),
        ("x: Path = Path('a')", "b", "b"),
        ("x: pathlib.Path = Path('a')", 3, TypeError),
        ("x: Optional[int] = None", None, None),
        ("x: Optional[int] = None", "a", TypeError),
        ("x: int | None = 3", None, None),
        ("x: int | str = 3", "a", "a"),
        ("x: float | int = 3", 4, 4),
        ("x: Union[str, float] = ''", 4, 4.0),
        ("x: list[float] = ()", [1, 0.5], [1.0, 0.5]),
        ("x: list[float] = ()", ["1e-3"], TypeError),
        ("x: list = ()", ["a", 1], ["a", 1]),
        ("x: typing.List[int] = ()", [1.5], TypeError),
        ("x: tuple[int, str] = ()", [1, "a"], [1, "a"]),
        ("x: tuple[int, str] = ()", [1], TypeError),
        ("x: tuple[float, ...] = ()", [1, 2], [1.0, 2.0]),
        ("x: dict[str, float] = {}", {"a": 1}, {"a": 1.0}),
        ("x: dict = {}", [], TypeError),
        ("x: dict[str, list[float]] = {}", {"a": [1]}, {"a": [1.0]}),
        ("x: Literal['a', 2] = 'a'", 2, 2),
        ("x: Literal['a', 2] = 'a'", "b", TypeError),
        ("x: Annotated[float, 'share'] = 0", 1, 1.0),
        ("x: Any = 0", "a", "a"),
        ("x: Seed = 0", 1, 1),
        ("x: Seed = 0", "a", TypeError),
        ("x: list[Seed] = ()", ["a"], ["a"]),
        ("x: 1 + = 0", 1, NotebookError),
    ],
)
def test_annotations_decide(notebook, line, value, given):
    "By their usual names, at any depth; one that is not known leaves it to the default"
    try:
        result = cells.as_declared(value, cells.parameters(notebook((line, "parameters")))["x"])
    except (TypeError, NotebookError) as e:
        result = type(e)
    assert result == given and type(result) is type(given)


def test_undeclared_parameter(notebook):
    path = notebook(("seed = 0\nrate = 0.1", "parameters"))
    cells.check_parameters(path, {"seed": 1, "rate": 1})
    with pytest.raises(NotebookError, match=r"no parameter 'sed' \(did you mean 'seed'\?\); its parameters are: seed, rate"):
        cells.check_parameters(path, {"sed": 1})
    with pytest.raises(NotebookError, match=r"parameter 'seed' has value 'one' of type str; write a value of type int, such as 0"):
        cells.check_parameters(path, {"seed": "one"})


@pytest.mark.parametrize(
    ("source", "python"),
    [
        ("%matplotlib inline", "__magic__('%matplotlib inline')"),
        ("if x:\n    %time f()", "if x:\n    __magic__('%time f()')"),
        ("files = !ls", "__magic__('files = !ls')"),
        ("f?", "__magic__('f?')"),
        ("%%bash\necho $HOME", "__magic__('%%bash\\necho $HOME')"),
        ("%%time\ny = 1", "__magic__('%%time')\ny = 1"),
        ("y = (a\n     % b)", "y = (a\n     % b)"),
        ("y = '''\n%s\n!x\n'''", "y = '''\n%s\n!x\n'''"),
        ("y = a != b", "y = a != b"),
    ],
)
def test_magics(source, python):
    assert cells.without_magics(source) == python


def test_code_skips_what_a_run_skips(notebook):
    path = notebook(("a = 1",), ("b = 2", "skip-execution"), ("c = = 3",))
    assert cells.code(cells.read(path)) == "a = 1\n__unparsed__('c = = 3')"
