"""Each mistake in pipeline.yaml, env.yaml or a parameter is one sentence that names it, and changes nothing on disk."""

import pytest
from pipeline_project import make, notebook

from mlnb.pipelines.spec import from_text, read
from mlnb.project.errors import PipelineError
from mlnb.project.settings import load_settings


@pytest.fixture
def project(tmp_path):
    return make(tmp_path / "project")


def spec(root, **parameters):
    return read(load_settings(root), parameters)


def sentence(root, **parameters):
    with pytest.raises(PipelineError) as e:
        spec(root, **parameters)
    return str(e.value)


def snapshot(root):
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def rewrite(root, old, new, name="pipeline.yaml"):
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


def test_it_is_read(project):
    found = spec(project)
    assert list(found.tasks) == ["first", "second", "other"]
    assert found.tasks["first"].params == {"n": 1} and found.tasks["second"].upstream == ("first",)
    assert found.tasks["other"].products == {"nb": project / "out" / "other.ipynb"}
    assert found.needed(["second"]) == {"first", "second"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("name: second", "name: first", "two tasks have the name 'first'"),
        ("source: nbs/other.ipynb", "source: nbs/absent.ipynb", "task 'other': there is no notebook"),
        ("source: nbs/other.ipynb", "source: other.py", "task 'other' has source 'other.py'; a task is a notebook"),
        ("    source: nbs/other.ipynb\n", "", "task 'other': 'source' is missing; write for example: source: nbs/train.ipynb"),
        ("    product: out/other.ipynb\n", "", "task 'other': 'product' is missing"),
        ("product: out/other.ipynb", "product: [a]", "'product' has value ['a']"),
        ("product: out/other.ipynb", "product: {nb: 3}", "'product' has value {'nb': 3}"),
        ("product: out/other.ipynb", "product: out/other.html", "must end with .ipynb"),
        ("product: out/other.ipynb", "product: out/second.ipynb", "tasks 'second' and 'other' both write"),
        ("product: out/other.ipynb", "prodct: out/other.ipynb", "unknown key 'prodct' (did you mean 'product'?)"),
        ("product: out/other.ipynb", "product: out/other.ipynb\n    executor_params: {timeout: 9}", "write for example: executor_params"),
        ("tasks:", "meta: {extract_product: true}\ntasks:", "'meta' has value {'extract_product': True}; leave it out"),
        ("tasks:", "tusks:", "needs a list of tasks"),
        ("tasks:", "executor: parallel\ntasks:", "unknown key 'executor'"),
        ('"{{n}}"', '"{{m}}"', "names 'm', which env.yaml does not define"),
        ('"{{n}}"', "{{n}}", 'is not valid YAML in line 6: found unhashable key; a placeholder stands in quotes: "{{name}}"'),
        ('{n: "{{n}}"}', "{k: 1}", "first.ipynb declares no parameter 'k'"),
        ('{n: "{{n}}"}', "{n: one}", "parameter 'n' has value 'one' of type str; write a value of type int"),
        ('{n: "{{n}}"}', "{n: 1, product: x}", "'product' is set by the pipeline"),
        ('{n: "{{n}}"}', "[n]", "'params' has value ['n']"),
        ("  - name: first", "  - first\n  - name: first", "task 1 is 'first'; write a mapping"),
        ("product: {nb", "product: nb: {", "is not valid YAML in line 5"),
    ],
)
def test_mistakes_in_the_pipeline(project, old, new, says):
    rewrite(project, old, new)
    before = snapshot(project)
    assert says in sentence(project)
    assert snapshot(project) == before


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ('upstream = ["frist"]\nproduct = None', "names the upstream task 'frist', which does not exist (did you mean 'first'?)"),
        ('upstream = ["second"]\nproduct = None', "wait for each other in a circle: second -> second"),
        ('upstream = ["fi" + "rst"]\nproduct = None', "must name upstream tasks literally"),
        ("upstream = [1]\nproduct = None", 'upstream is [1]; write for example: upstream = ["ingest"]'),
        (None, "second.ipynb has no parameters cell"),
    ],
)
def test_mistakes_in_a_parameters_cell(project, parameters, says):
    notebook(project / "nbs" / "second.ipynb", parameters, "1")
    before = snapshot(project)
    assert says in sentence(project)
    assert snapshot(project) == before


def test_a_longer_circle_names_its_tasks(project):
    notebook(project / "nbs" / "first.ipynb", 'upstream = ["second"]\nproduct = None\nn = 1', "1")
    said = sentence(project)
    assert "circle" in said and "first" in said and "second" in said


def test_upstream_patterns_and_mappings(project):
    notebook(project / "nbs" / "other.ipynb", 'upstream = {"fi*": None, "second": None}\nproduct = None', "1")
    assert spec(project).tasks["other"].upstream == ("first", "second")


def test_missing_or_empty_files(project):
    (project / "env.yaml").write_text("[1]")
    assert "env.yaml needs names with values" in sentence(project)
    (project / "env.yaml").unlink()
    assert "names 'n', which env.yaml does not define" in sentence(project)
    (project / "pipeline.yaml").unlink()
    assert "pipeline.yaml; write it, or make a project that has one" in sentence(project)


def test_overrides(project):
    assert spec(project, n=5).tasks["first"].params == {"n": 5}
    assert spec(project, extra=2).tasks["second"].params == {"extra": 2}
    assert spec(project, extra=2).parameters == {"n": 1, "extra": 2}
    assert "neither env.yaml nor any notebook declares a parameter 'extr' (did you mean 'extra'?)" in sentence(project, extr=2)
    assert "parameter 'n' has value 'five' of type str; write a value of type int, such as 1" in sentence(project, n="five")
    assert "parameter 'extra' has value 0.5 of type float" in sentence(project, extra=0.5)


def test_types_and_dates_survive(project):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None\na = None\nb = None", "1")
    rewrite(project, "product: out/other.ipynb", 'product: "out/{{tag}}.ipynb"\n    params: {a: "{{tag}}", b: ["{{day}}", "{{here}}/x"]}')
    (project / "env.yaml").write_text('n: 1\ntag: "007"\nday: 2013-05-31\n')
    found = spec(project).tasks["other"]
    assert found.params == {"a": "007", "b": ["2013-05-31", f"{project}/x"]}
    assert found.products["nb"].name == "007.ipynb"


def test_parameters_from_a_command_line(project):
    (project / "env.yaml").write_text('n: 1\nday: "2013-05-31"\nshare: 0.5\nnames: [a]\nfast: true\n')
    texts = ["n=2", "day=2014-01-01", "share=1", "names=[b, c]", "fast=false", "extra=3"]
    given = {"n": 2, "day": "2014-01-01", "share": 1, "names": ["b", "c"], "fast": False, "extra": 3}
    assert from_text(load_settings(project), texts) == given
    for wrong in ("n", "=1", "n=[", "1n=2"):
        with pytest.raises(PipelineError, match="write for example"):
            from_text(load_settings(project), [wrong])
