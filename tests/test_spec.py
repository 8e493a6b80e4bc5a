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


LAST = "product: out/other.ipynb"


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
        *(
            (LAST, f"{LAST}\n    {key}: {value}", f"task 'other': '{key}' has value {shown}; write for {right}")
            for key, value, shown, right in [
                ("inputs", "3", "3", "example: inputs: [data/*.csv, config/limits.json]"),
                ("inputs", "[a, 3]", "['a', 3]", "example: inputs"),
                ("inputs", '[""]', "['']", "example: inputs"),
                ("cpu", "many", "'many'", "example: cpu: 2"),
                ("cpu", "-1", "-1", "example: cpu: 2"),
                ("cpu", ".inf", "inf", "example: cpu: 2"),
                ("gpu", "true", "True", "example: gpu: 1"),
                ("memory", "much", "'much'", "example: memory: 4 GB"),
                ("memory", "0", "0", "example: memory: 4 GB"),
                ("memory", "[4]", "[4]", "example: memory: 4 GB"),
                ("retries", "1.5", "1.5", "example: retries: 2"),
                ("retries", "-1", "-1", "example: retries: 2"),
                ("retry_delay", "soon", "'soon'", "example: retry_delay: 5"),
                ("timeout", "0", "0", "example: timeout: 3600"),
                ("timeout", "1h", "'1h'", "example: timeout: 3600"),
            ]
        ),
        ("product: out/other.ipynb", "product: out/other.ipynb\n    retry: 2", "unknown key 'retry' (did you mean 'retries'?)"),
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


def test_what_a_task_needs(project):
    other = spec(project).tasks["other"]
    assert (other.inputs, other.cpu, other.gpu, other.memory, other.retries, other.retry_delay) == ((), 1, 0, None, 0, 1)
    assert (other.timeout, other.task_timeout) == (None, None)
    keys = """
    inputs: [data/*.csv, "{{here}}/x"]
    cpu: 0.5
    gpu: 1
    memory: 1.5 GiB
    retries: 2
    retry_delay: 0
    timeout: 90
    executor_params: {execution_timeout: 9}"""
    rewrite(project, LAST, LAST + keys)
    other = spec(project).tasks["other"]
    assert (other.inputs, other.cpu, other.gpu, other.memory) == (("data/*.csv", f"{project}/x"), 0.5, 1, 3 << 29)
    assert (other.retries, other.retry_delay, other.task_timeout, other.timeout) == (2, 0, 90, 9)
    rewrite(project, "memory: 1.5 GiB", "memory: 1000")
    rewrite(project, 'inputs: [data/*.csv, "{{here}}/x"]', "inputs: data")
    assert (spec(project).tasks["other"].memory, spec(project).tasks["other"].inputs) == (1000, ("data",))


def test_ends(project):
    found = spec(project)
    assert found.selected() == ["first", "second", "other"]
    assert found.selected(["second"]) == found.selected(to="second") == ["first", "second"]
    assert found.selected(from_="first") == ["first", "second"] and found.selected(from_=["second", "other"]) == ["second", "other"]
    assert found.selected(["second"], from_="first") == ["first", "second"] and found.selected(to="second", from_="second") == ["second"]
    assert found.dependent(["first"]) == {"first", "second"}
    with pytest.raises(PipelineError, match=r"there is no task 'secund' \(did you mean 'second'\?\)"):
        found.selected(from_="secund")
    with pytest.raises(PipelineError, match="no task lies between second and other; --from names a task that the one of --to needs"):
        found.selected(to="other", from_="second")


def test_a_long_pipeline_is_ordered_as_it_is_written(tmp_path):
    "Each after those that it needs, otherwise as written; the time grows with the number of tasks, not with its square"
    from mlnb.pipelines.spec import TaskSpec, _ordered, _wired

    n = 3000
    tasks = {f"t{i}": TaskSpec(f"t{i}", tmp_path, tmp_path, upstream=(f"t{i + 1}",) if i % 3 == 0 and i < n - 1 else ()) for i in range(n)}
    order = list(_ordered(tasks, _wired(tasks)))
    assert order[:6] == ["t1", "t0", "t2", "t4", "t3", "t5"] and len(order) == n


def test_what_was_read_is_said(project):
    found = spec(project)
    assert set(found.looks) == {str(project / n) for n in ("pipeline.yaml", "env.yaml", *(f"nbs/{t}.ipynb" for t in found.tasks))}
    assert not found.volatile
    rewrite(project, '"{{n}}"', '"{{n}} {{now}}"')
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = ''", "1")
    assert spec(project).volatile
