"""Each mistake in pipeline.yaml, env.yaml or a parameter is one sentence that names it, and changes nothing on disk."""

import os
import socket
from contextlib import chdir

import pytest
from pipeline_project import make, notebook

from mlnb.pipelines.spec import parse_parameters, read
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


LAST = "product: out/other.ipynb"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("name: second", "name: first", "two tasks have the name 'first'"),
        ("source: nbs/other.ipynb", "source: nbs/absent.ipynb", "task 'other': there is no notebook"),
        ("source: nbs/other.ipynb", "source: other.R", "task 'other' has source 'other.R'; a task is a notebook"),
        (
            "    source: nbs/other.ipynb\n",
            "",
            "task 'other': 'source' is missing; write for example: source: nbs/train.ipynb",
        ),
        ("    product: out/other.ipynb\n", "", "task 'other': 'product' is missing"),
        ("product: out/other.ipynb", "product: [a]", "'product' has value ['a']"),
        ("product: out/other.ipynb", "product: {nb: 3}", "'product' has value {'nb': 3}"),
        ("product: out/other.ipynb", "product: out/other.html", "must end with .ipynb"),
        ("product: out/other.ipynb", "product: out/second.ipynb", "tasks 'second' and 'other' both write"),
        ("product: out/other.ipynb", "prodct: out/other.ipynb", "unknown key 'prodct' (did you mean 'product'?)"),
        (
            "product: out/other.ipynb",
            "product: out/other.ipynb\n    executor_params: {timeout: 9}",
            "write for example: executor_params",
        ),
        ("tasks:", "meta: {extract_product: true}\ntasks:", "'meta' has value {'extract_product': True}; leave it out"),
        ("tasks:", "tusks:", "needs a list of tasks"),
        ("tasks:", "executor: parallel\ntasks:", "unknown key 'executor'"),
        ('"{{n}}"', '"{{m}}"', "names 'm', which env.yaml does not define"),
        (
            '"{{n}}"',
            "{{n}}",
            'is not valid YAML in line 6: found unhashable key; write a placeholder in quotes: "{{name}}"',
        ),
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
        (
            "product: out/other.ipynb",
            "product: out/other.ipynb\n    retry: 2",
            "unknown key 'retry' (did you mean 'retries'?)",
        ),
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
        (
            'upstream = ["frist"]\nproduct = None',
            "names the upstream task 'frist', which does not exist (did you mean 'first'?)",
        ),
        ('upstream = ["second"]\nproduct = None', "depend on each other in a circle: second -> second"),
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
    assert "pipeline.yaml; write it, or add it with: mlnb init" in sentence(project)


def test_overrides(project):
    assert spec(project, n=5).tasks["first"].params == {"n": 5}
    assert spec(project, extra=2).tasks["second"].params == {"extra": 2}
    assert spec(project, extra=2).parameters == {"n": 1, "extra": 2}
    assert "neither env.yaml nor any notebook declares a parameter 'extr' (did you mean 'extra'?)" in sentence(
        project, extr=2
    )
    assert "parameter 'n' has value 'five' of type str; write a value of type int, such as 1" in sentence(
        project, n="five"
    )
    assert "parameter 'extra' has value 0.5 of type float" in sentence(project, extra=0.5)


def test_an_override_reaches_a_task_or_is_refused(project):
    rewrite(project, 'params: {n: "{{n}}"}', "params: {n: 3}")
    assert [spec(project, **given).tasks["first"].params for given in ({}, {"n": 5})] == [{"n": 3}, {"n": 5}]
    rewrite(project, "params: {n: 3}", "params: {}")
    assert spec(project, n=5).tasks["first"].params == {"n": 5}
    (project / "env.yaml").write_text("n: 1\nspare: 1\n")
    assert (
        "parameter 'spare' would change nothing, since no task uses it; write {{spare}} in pipeline.yaml"
        in sentence(project, spare=2)
    )


def test_types_and_dates_survive(project):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None\na = None\nb = None", "1")
    rewrite(
        project,
        "product: out/other.ipynb",
        'product: "out/{{tag}}.ipynb"\n    params: {a: "{{tag}}", b: ["{{day}}", "{{here}}/x"]}',
    )
    (project / "env.yaml").write_text('n: 1\ntag: "007"\nday: 2013-05-31\n')
    found = spec(project).tasks["other"]
    assert found.params == {"a": "007", "b": ["2013-05-31", f"{project}/x"]}
    assert found.products["nb"].name == "007.ipynb"


def test_parameters_from_a_command_line(project):
    (project / "env.yaml").write_text('n: 1\nday: "2013-05-31"\nshare: 0.5\nnames: [a]\nfast: true\n')
    texts = ["n=2", "day=2014-01-01", "share=1", "names=[b, c]", "fast=false", "extra=3"]
    given = {"n": 2, "day": "2014-01-01", "share": 1, "names": ["b", "c"], "fast": False, "extra": 3}
    assert parse_parameters(load_settings(project), texts) == given
    for wrong in ("n", "=1", "n=[", "1n=2"):
        with pytest.raises(PipelineError, match="write for example"):
            parse_parameters(load_settings(project), [wrong])


def test_what_a_task_needs(project):
    other = spec(project).tasks["other"]
    assert (other.inputs, other.cpu, other.gpu, other.memory, other.retries, other.retry_delay) == (
        (),
        1,
        0,
        None,
        0,
        1,
    )
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
    assert found.selected(from_="first") == ["first", "second"] and found.selected(from_=["second", "other"]) == [
        "second",
        "other",
    ]
    assert found.selected(["second"], from_="first") == ["first", "second"] and found.selected(
        to="second", from_="second"
    ) == ["second"]
    with pytest.raises(PipelineError, match=r"there is no task 'secund' \(did you mean 'second'\?\)"):
        found.selected(from_="secund")
    with pytest.raises(
        PipelineError, match="no task lies between second and other; --from must name a task upstream of --to"
    ):
        found.selected(to="other", from_="second")


def test_a_long_pipeline_is_ordered_as_it_is_written(tmp_path):
    "Each after those that it needs, otherwise as written; the time grows with the number of tasks, not with its square"
    from mlnb.pipelines.spec import TaskSpec, _ordered, _resolved_upstream

    n = 3000
    tasks = {
        f"t{i}": TaskSpec(f"t{i}", tmp_path, tmp_path, upstream=(f"t{i + 1}",) if i % 3 == 0 and i < n - 1 else ())
        for i in range(n)
    }
    order = list(_ordered(tasks, _resolved_upstream(tasks)))
    assert order[:6] == ["t1", "t0", "t2", "t4", "t3", "t5"] and len(order) == n


def test_what_was_read_is_said(project):
    found = spec(project)
    assert set(found.signatures) == {
        str(project / n) for n in ("pipeline.yaml", "env.yaml", *(f"nbs/{t}.ipynb" for t in found.tasks))
    }
    assert not found.volatile
    rewrite(project, '"{{n}}"', '"{{n}} {{now}}"')
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = ''", "1")
    assert spec(project).volatile


AMBIGUOUS = {
    "yes": "true", "No": "false", "on": "true", "OFF": "false", "None": "null", "012": "12", "08": "8", "-007": "-7",
    "1_000": "1000",
    "1_0.5": "10.5", "0b101": "5", "-0x1F": "-31", "2013_05": "201305",
}  # fmt: skip
NUMBERS = {
    "1e-3": 1e-3, "1e3": 1000.0, "0o17": 15, "0x1F": 31, ".5": 0.5, "1.": 1.0, "+1": 1, "-0": 0, ".inf": float("inf"),
    "12345678901234567890": 12345678901234567890,
}  # fmt: skip
TEXTS = ("12:30", "1:30:00", "2013-07-01", "2013-07-01 10:15:00", "1.2.3", "y", "none", "nan", "=", "0o8")
OTHERS = {"~": None, "NULL": None, "True": True, '"1e-3"': "1e-3", "'yes'": "yes"}
READ = NUMBERS | {text: text for text in TEXTS} | OTHERS


def loose(project):
    "A project whose other task takes anything as `a`"
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None\na = None", "1")
    rewrite(project, LAST, f"{LAST}\n    params: {{a: [0, {{b: [A]}}]}}")


def test_values_are_those_of_yaml_1_2_at_any_depth(project):
    "In pipeline.yaml, in env.yaml and on the command line alike"
    loose(project)
    rewrite(project, "[A]", f"[{', '.join(READ)}, '{{{{deep}}}}']")
    (project / "env.yaml").write_text(f"n: 1\ndeep: {{b: [{', '.join(READ)}]}}\n")
    values = list(READ.values())
    given = spec(project).tasks["other"].params["a"][1]["b"]
    assert given == [*values, {"b": values}] and list(map(type, given)) == [*map(type, values), dict]
    (project / "env.yaml").write_text("n: 1\ndeep: 1\n")
    settings = load_settings(project)
    texts = [f"a={{b: [{', '.join(READ)}]}}"]
    assert parse_parameters(settings, texts) == {"a": {"b": values}}
    for text, value in READ.items():
        assert parse_parameters(settings, [f"a={text}"]) == {"a": value}


@pytest.mark.parametrize(("text", "right"), AMBIGUOUS.items(), ids=AMBIGUOUS)
def test_ambiguous_values_are_refused_with_the_right_form(project, text, right):
    loose(project)
    says = f'{text} is ambiguous; write {right}, or "{text}" in quotes for the text'
    with pytest.raises(PipelineError) as e:
        parse_parameters(load_settings(project), [f"a=[{text}]"])
    assert str(e.value) == f"parameter 'a': {says}; in a shell: --param 'a=\"...\"'"
    rewrite(project, "[A]", f"[{text}]")
    assert sentence(project) == f"{project}/pipeline.yaml, line 13: {says}"
    rewrite(project, f"[{text}]", f'["{text}"]')
    assert spec(project).tasks["other"].params["a"][1]["b"] == [text]
    (project / "env.yaml").write_text(f"n: 1\ndeep:\n  {text}: 1\n")  # a key is a text
    assert spec(project).parameters["deep"] == {text: 1}
    (project / "env.yaml").write_text(f"n: 1\ndeep:\n  - {text}\n")
    assert sentence(project) == f"{project}/env.yaml, line 3: {says}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n: 1\nm: 2\nn: 3\n", "env.yaml, line 3: the key 'n' is in line 1 already"),
        ('n: 1\nm: {a: 1, b: 2, "a": 3}\n', "env.yaml, line 2: the key 'a' is in line 2 already"),
        ("n: 1\nm: &x {a: 1}\nk: {<<: *x, b: 1, b: 2}\n", "env.yaml, line 3: the key 'b'"),
        ("n: 1e999\n", "is not valid YAML in line 1: 1e999 is larger than any float; write .inf"),
        ("n: 1\nm: &x [*x]\n", "an anchor (&) contains an alias (*) of itself"),
        ("n: " + "[" * 5000, "it is nested more than 200 levels deep"),
        ("n: 1\nm: {2: x}\n", "key 2 has type int; keys of notebook parameters are texts, write it in quotes"),
    ],
)
def test_what_a_reader_would_lose_or_choke_on(project, text, says):
    (project / "env.yaml").write_text(text)
    assert says in sentence(project)


def test_keys_that_are_merged_may_be_overridden(project):
    (project / "env.yaml").write_text("n: 1\nbase: &base {rate: 0.1, seed: 0}\nmine: {<<: *base, seed: 1}\n")
    assert spec(project).parameters["mine"] == {"rate": 0.1, "seed": 1}


def test_annotations_decide_what_a_value_is(project):
    cell = [
        "upstream = None",
        "product = None",
        "x: float = 0",
        "rates: list[float] = ()",
        "t: str = 0",
        "label: str | None = None",
    ]
    notebook(project / "nbs" / "other.ipynb", "\n".join([*cell, "k: int = 0", "home: Path = None"]), "1")
    texts = ["x=1", "rates=[1, 5e-1]", "t=012", "label=12:30", "k=3", "home="]
    given = parse_parameters(load_settings(project), texts)
    assert given == {"x": 1, "rates": [1, 0.5], "t": "012", "label": "12:30", "k": 3, "home": ""}
    params = spec(project, **given).tasks["other"].params
    assert params["x"] == 1.0 and type(params["x"]) is float and list(map(type, params["rates"])) == [float, float]
    assert parse_parameters(load_settings(project), ["label=", "t=null", "label=null"]) == {"label": None, "t": None}
    for wrong, says in {
        "x=a": "write a value of type float, such as 0",
        "k=0.5": "write a value of type int, such as 0",
    }.items():
        with pytest.raises(PipelineError, match=says):
            spec(project, **parse_parameters(load_settings(project), [wrong]))
    with pytest.raises(PipelineError, match="parameter 'k' has no value; write for example: k=0"):
        parse_parameters(load_settings(project), ["k="])


def test_no_value_is_refused_where_nothing_says_what_it_is(project):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None\na = None", "1")
    for text in ("a=", "a=  "):
        with pytest.raises(
            PipelineError, match="parameter 'a' has no value; write a=null for None, or a='\"\"' for an empty text"
        ):
            parse_parameters(load_settings(project), [text])
    assert parse_parameters(load_settings(project), ["a=null"]) == {"a": None}


def test_a_whole_number_of_env_yaml_may_become_a_float(project):
    "Where the notebooks that are given it take one"
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn: float = 0", "1")
    assert spec(project, n=0.5).tasks["first"].params == {"n": 0.5}
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn: int = 0", "1")
    assert "parameter 'n' has value 0.5 of type float; write a value of type int" in sentence(project, n=0.5)


@pytest.mark.parametrize("place", ["env.yaml", "params", "key", "product", "inputs", "source", "upstream", "override"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{a.b}}", "names 'a.b', which env.yaml does not define"),
        ("x-{{ a-b }}", "names 'a-b', which env.yaml does not define"),
        ("{{}}", "has the placeholder {{}}; write {{name}} with a name of env.yaml"),
        ("{{n|upper}}", "has the placeholder {{n|upper}}; write {{name}}"),
        ("{{n + 1}}", "has the placeholder {{n + 1}}; write {{name}}"),
        ("x{{n", "has '{{', which is not a placeholder; write {{name}}"),
        ("{n}}", "has '{n}}', which is not a placeholder"),
        ("{% if n %}x{% endif %}", "has '{% if n %}', which is not a placeholder"),
        ("{# n #}", "has '{# n #}', which is not a placeholder"),
    ],
)
def test_what_looks_like_a_placeholder_is_a_value_or_an_error(project, place, text, says):
    loose(project)
    quoted, parameters = f'"{text}"', {}
    if place == "env.yaml":
        (project / "env.yaml").write_text(f"n: 1\nm: [{quoted}]\n")
    elif place == "params":
        rewrite(project, "[A]", f"[{quoted}]")
    elif place == "key":
        rewrite(project, "b: [A]", f"{quoted}: 1")
        says = "has a placeholder; only values can have one" if "{{" in text else None
    elif place == "override":
        parameters = {"a": [text]}
    else:
        old = {"product": LAST, "source": "source: nbs/other.ipynb"}.get(place)
        rewrite(project, old or LAST, f"{place}: {quoted}" if old else f"{LAST}\n    {place}: [{quoted}]")
    if says:
        assert says in sentence(project, **parameters)


def test_placeholders_reach_into_mappings_and_braces_can_be_written(project):
    loose(project)
    rewrite(
        project,
        "[A]",
        """["{{m.rate}}", "{{ m.deep.x }}", "{{a-b}}", "{{c.d}}", "{{ '{{' }}x}}", """
        """'{"a": {"b": 1}}', "{x}", "100%}"]""",
    )
    (project / "env.yaml").write_text('n: 1\nm: {rate: 0.5, deep: {x: [1]}}\na-b: 2\n"c.d": 3\n')
    assert spec(project).tasks["other"].params["a"][1]["b"] == [
        0.5,
        [1],
        2,
        3,
        "{{x}}",
        '{"a": {"b": 1}}',
        "{x}",
        "100%}",
    ]
    rewrite(project, LAST, 'product: "out/{{m}}.ipynb"')
    assert "puts 'm' into a longer text, but its value is {'rate': 0.5" in sentence(project)


@pytest.mark.parametrize("key", ["product", "inputs", "source"])
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("s3://bucket/a.ipynb", "a URL; write a path such as"),
        ("gs://bucket/a.ipynb", "a URL"),
        ("https://host/a.ipynb", "a URL"),
        ("file:///tmp/a.ipynb", "a URL"),
        ("s3:/bucket/a.ipynb", "a URL"),
        ("~/a.ipynb", "a path with ~, which is not expanded"),
        ("~ann/a.ipynb", "a path with ~"),
        ("$HOME/a.ipynb", "a path with a variable, which is not expanded"),
        ("out/${RUN}/a.ipynb", "a path with a variable"),
        ("C:/data/a.ipynb", "a Windows path"),
        ("C:\\data\\a.ipynb", "a Windows path"),
        ("out\\a.ipynb", "a path with a backslash"),
        (" out/a.ipynb", "a path that starts or ends with white space"),
    ],
)
def test_paths_of_other_systems_are_refused(project, key, path, says):
    rewrite(project, LAST, f"{LAST}\n    inputs: []")
    old = {"product": LAST, "source": "source: nbs/other.ipynb", "inputs": "inputs: []"}[key]
    rewrite(project, old, f"{key}: '{path}'")
    assert f"'{key}' has {path!r}, {says}" in sentence(project)


def test_a_path_may_have_odd_names(project):
    rewrite(project, LAST, "product: 'out/10:30 ~$5 [a].ipynb'\n    inputs: [/abs/a.csv, ../b.csv, './~x']")
    assert spec(project).tasks["other"].products["nb"] == project / "out" / "10:30 ~$5 [a].ipynb"


def test_special_files_are_named_where_a_notebook_or_yaml_is_expected(project):
    "A FIFO would be waited for, a file of a terabyte fills the memory"
    source = project / "nbs" / "other.ipynb"
    source.unlink()
    os.mkfifo(source)
    assert f"task 'other': notebook {source} is a FIFO; it has to be a file" in sentence(project)
    source.unlink()
    with source.open("wb") as file:
        file.truncate(1 << 40)
    assert f"notebook {source} has 1024 GiB" in sentence(project)
    source.unlink()
    os.symlink("/dev/zero", source)
    assert f"notebook {source} is a device" in sentence(project)
    (project / "env.yaml").unlink()
    with socket.socket(socket.AF_UNIX) as listener, chdir(project):
        listener.bind("env.yaml")
        assert "env.yaml is a socket" in sentence(project)


def test_products_are_paths_as_written_below_the_folders_that_they_lead_to(project, tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", project / "out")
    os.symlink(tmp_path / "elsewhere", project / "out" / "other.ipynb")
    assert spec(project).tasks["other"].products["nb"] == tmp_path / "disk" / "other.ipynb"
    rewrite(project, "product: out/other.ipynb", f"product: {tmp_path}/disk/first.ipynb")
    assert "tasks 'first' and 'other' both write" in sentence(project)
    rewrite(project, f"product: {tmp_path}/disk/first.ipynb", "product: loop/a.ipynb")
    os.symlink("loop", project / "loop")
    assert "'product' has 'loop/a.ipynb', whose folder is a link that leads back to itself" in sentence(project)


def test_a_product_never_replaces_a_link_to_a_notebook_or_its_own_input(project, tmp_path):
    os.rename(project / "nbs" / "other.ipynb", tmp_path / "mine.ipynb")
    os.symlink(tmp_path / "mine.ipynb", project / "nbs" / "other.ipynb")
    for product in ("nbs/other.ipynb", "../mine.ipynb"):
        rewrite(project, LAST, f"product: {product}")
        assert "product 'nb' would replace" in sentence(project)
        rewrite(project, f"product: {product}", LAST)
    rewrite(project, LAST, "product: {nb: out/other.ipynb, data: data}\n    inputs: [data/raw.csv]")
    assert f"product 'data' would replace {project}/data, which is or contains its own input data/raw.csv" in sentence(
        project
    )
