"""Reading notebooks: broken files, parameters in every form, magics."""

import json
import os

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
        ('{"cells": [], "nbformat": 3}', "is not a notebook of format 4: nbformat is 3"),
        ('{"cells": [{"cell_type": "code"}], "nbformat": 4}', "cell 1: source is missing"),
        ('{"cells": [{"cell_type": "poem", "source": ""}], "nbformat": 4}', 'cell 1: cell_type is "poem"'),
        ("\x00\xff", "is not a notebook"),
    ],
)
def test_broken_files_are_named(tmp_path, text, says):
    path = tmp_path / "broken.ipynb"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(NotebookError, match=says) as e:
        cells.read(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ({"metadata": None}, "metadata is null"),
        ({"metadata": []}, "metadata is a list"),
        ({"metadata": {"tags": None}}, "metadata.tags is null"),
        ({"metadata": {"tags": "parameters"}}, "metadata.tags is a string; write a list of strings"),
        ({"metadata": {"tags": [None]}}, "metadata.tags is a list with more in it than strings"),
        ({"metadata": {"nbdev": None}}, "metadata.nbdev is null"),
        ({"source": None}, "source is null"),
        ({"source": 7}, "source is a number"),
        ({"source": ["a", ["b"]]}, "source is a list with more in it than strings"),
        ({"source": {}}, "source is an object"),
        ({"source": "x = '\ud800'"}, "a string holds half of a character"),
        ({"cell_type": None}, "cell_type is null"),
        ({"cell_type": []}, r"cell_type is \[\]"),
        ({"id": 3}, "id is a number"),
        ({"execution_count": "3"}, "execution_count is a string"),
        ({"execution_count": True}, "execution_count is true or false"),
        ({"outputs": None}, "outputs is null"),
        ({"outputs": [None]}, "outputs is a list with more in it than objects"),
        ({"attachments": None}, "attachments is null"),
        ({"outputs": [{"data": {"application/json": float("nan")}}]}, "nan is not JSON"),
        ({"outputs": [{"data": {"application/json": [float("-inf")]}}]}, "-inf is not JSON"),
    ],
)
def test_odd_cells_are_named_by_their_number(notebook, cell, says):
    path = notebook(("a = 1",))
    document = json.loads(path.read_text())
    document["cells"].append({"cell_type": "code", "source": "b = 2", "metadata": {}, "outputs": []} | cell)
    path.write_text(json.dumps(document))
    with pytest.raises(NotebookError, match=f"task.ipynb is not a valid notebook: cell 2: {says}"):
        cells.read(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metadata": None}, "metadata is null"),
        ({"metadata": {"kernelspec": None}}, "metadata.kernelspec is null"),
        ({"metadata": {"kernelspec": "python3"}}, "metadata.kernelspec is a string"),
        ({"metadata": {"kernelspec": {"name": None}}}, "metadata.kernelspec.name is null"),
        ({"metadata": {"kernelspec": {"language": None}}}, "metadata.kernelspec.language is null"),
        ({"metadata": {"language_info": None}}, "metadata.language_info is null"),
        ({"metadata": {"language_info": {"name": 3}}}, "metadata.language_info.name is a number"),
        ({"metadata": {"nbdev": None}}, "metadata.nbdev is null"),
        ({"metadata": {"x": float("inf")}}, "inf is not JSON"),
        ({"nbformat_minor": None}, "nbformat_minor is null"),
        ({"cells": None}, "needs a list of cells"),
        ({"cells": {}}, "needs a list of cells"),
        ({"cells": [None]}, "cell 1: null is not a cell"),
        ({"cells": ["x = 1"]}, "cell 1: a string is not a cell"),
        ({"nbformat": "4"}, 'format 4: nbformat is "4"'),
        ({"nbformat": 4.0}, "format 4: nbformat is 4.0"),
        ({"nbformat": True}, "format 4: nbformat is true"),
    ],
)
def test_odd_notebooks_are_named(notebook, changes, says):
    path = notebook(("a = 1",), **changes)
    with pytest.raises(NotebookError, match=f"task.ipynb .*{says}"):
        cells.read(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "it is not UTF-8 at byte 0"),
        (b'{"x": "\xff"}', "it is not UTF-8 at byte 7"),
        (b" \n", "it is empty"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"nbformat": ' + b"4" * 5000 + b"}", "is not a notebook"),
        (
            b'{"nbformat": 4, "cells": [{"cell_type": "code", "source": "1", "source": "2"}]}',
            "cell 1: the key 'source' appears twice",
        ),
        (b'{"nbformat": 4, "cells": [], "metadata": {"a": 1, "a": 1}}', "the key 'a' appears twice"),
        (b'{"nbformat": 4, "cells": [], "cells": []}', "the key 'cells' appears twice"),
    ],
)
def test_odd_bytes(tmp_path, data, says):
    (tmp_path / "odd.ipynb").write_bytes(data)
    with pytest.raises(NotebookError, match=f"odd.ipynb .*{says}"):
        cells.read(tmp_path / "odd.ipynb")


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.ipynb").mkdir()
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / "link.ipynb").symlink_to("gone.ipynb")
    for name, says in {
        "absent": "there is no",
        "folder": "is not a file",
        "pipe": "is not a file",
        "link": "a link to gone.ipynb",
    }.items():
        with pytest.raises(NotebookError, match=rf"(?=.*{name}.ipynb).*{says}"):
            cells.read(tmp_path / f"{name}.ipynb")


def test_what_is_left_out_is_not_odd(tmp_path):
    (tmp_path / "small.ipynb").write_text(
        '{"cells": [{"cell_type": "code", "source": ["a = 1\\n", "b = 2"]}], "nbformat": 4}'
    )
    assert cells.python_source(cells.read(tmp_path / "small.ipynb")) == "a = 1\nb = 2"


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
    parameter = cells.parameters(notebook((line, "parameters")))["x"]
    assert (parameter.default, parameter.literal) == (default, literal)


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
    assert (cells.type_mismatch("x", value, default) is None) is fits


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
        result = cells.coerce_value(value, cells.parameters(notebook((line, "parameters")))["x"])
    except (TypeError, NotebookError) as e:
        result = type(e)
    assert result == given and type(result) is type(given)


def test_undeclared_parameter(notebook):
    path = notebook(("seed = 0\nrate = 0.1", "parameters"))
    cells.check_parameters(path, {"seed": 1, "rate": 1})
    with pytest.raises(
        NotebookError, match=r"no parameter 'sed' \(did you mean 'seed'\?\); its parameters are: seed, rate"
    ):
        cells.check_parameters(path, {"sed": 1})
    with pytest.raises(
        NotebookError, match=r"parameter 'seed' has value 'one' of type str; write a value of type int, such as 0"
    ):
        cells.check_parameters(path, {"seed": "one"})


@pytest.mark.parametrize(
    ("source", "python"),
    [
        ("%matplotlib inline", "__magic__('%matplotlib inline')"),
        ("if x:\n    %time f()", "if x:\n    __magic__('%time f()')\n    f()"),
        ("files = !ls", "files = __magic__('!!ls')"),
        ("a, b = %sql x", "a, b = __magic__('%sql x')"),
        ("f?", "__magic__('%pinfo f')"),
        ("?f", "__magic__('%pinfo f')"),
        ("!!ls", "__magic__('!!ls')"),
        ("!ls \\\n  -l\nx = 1", "__magic__('!ls    -l')\nx = 1"),
        ("%%bash\necho $HOME", "__magic__('%%bash\\necho $HOME')"),
        ("%%time\ny = 1", "__magic__('%%time')\ny = 1"),
        ("\n%%time\ny = 1", "__magic__('%%time')\ny = 1"),
        ("%time import a", "__magic__('%time import a')\nimport a"),
        ("%time %run s.py", "__magic__('%time %run s.py')\n__magic__('%run s.py')"),
        ("%timeit -n 3 -r 2 f(x)", "__magic__('%timeit -n 3 -r 2 f(x)')\nf(x)"),
        ("%%timeit import a\na.f()", "__magic__('%%timeit import a')\nimport a\na.f()"),
        (
            "%%capture out\nimport a\n%time a.f()",
            "__magic__('%%capture out')\nimport a\n__magic__('%time a.f()')\na.f()",
        ),
        ("%%scalene\nimport a", "__magic__('%%scalene\\nimport a')\nimport a"),
        ("%%script python3\nimport a", "__magic__('%%script python3\\nimport a')\nimport a"),
        ("%%javascript\nalert(1)", "__magic__('%%javascript\\nalert(1)')"),
        (">>> x = 1\n>>> y = 2", "x = 1\ny = 2"),
        ("In [3]: x = 1\n   ...: y = 2", "x = 1\ny = 2"),
        ("    x = 1\n    y = 2", "x = 1\ny = 2"),
        ("/f 1", "f(1)"),
    ],
)
def test_magics(source, python):
    assert cells.replace_magics(source) == python


@pytest.mark.parametrize(
    "source",
    [
        "r = f() \\\n    % 1000",
        "y = (a\n     % b)",
        "y = [\n    a\n    %b]",
        "y = '''\n%s\n!x\nf?\n'''",
        "y = f'''{\na\n% b}'''",
        "y = 1 \\\n    if a \\\n    != b else 2",
        "y = a != b",
        "await f(x)",
        "async with a as b:\n    pass",
        "return 3",
        "# %time x",
        "x = 1  # !ls\n",
        "def broken(",
        "x = 1\ndef broken(:\n    !ls",
    ],
)
def test_what_is_no_magic_is_left_as_it_is(source):
    assert cells.replace_magics(source) == source


def test_code_skips_what_a_run_skips(notebook):
    path = notebook(("a = 1",), ("b = 2", "skip-execution"), ("c = = 3",))
    assert cells.python_source(cells.read(path)) == "a = 1\n__unparsed__('c = = 3')"
