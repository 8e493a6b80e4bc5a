"""Fitted models of each library become bundles that another process loads, and that refuse tampering."""

import json
import os
import shutil
import signal
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
import toy_project

from mlnb.data.fields import Field
from mlnb.models.adapters import LightGBMModel, OnnxModel, SklearnModel, TorchModel, XGBoostModel
from mlnb.models.binary import Binary
from mlnb.models.bundle import Bundle
from mlnb.models.feature_schema import FeatureSchema
from mlnb.models.multiclass import Multiclass
from mlnb.models.regression import Regression
from mlnb.models.tabular import TabularPredictor
from mlnb.models.write_bundle import Samples, write_bundle
from mlnb.project.errors import BundleError, MlnbError

ROWS = 160
CODE = {
    "__init__": "",
    "nets": """
import torch


class Net(torch.nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.plan = torch.nn.Embedding(4, 2)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, outputs))

    def forward(self, plan, age, active):
        return self.body(torch.cat([self.plan(plan), torch.nan_to_num(age)[:, None] / 50, active[:, None]], dim=1))
""",
    "steps": """
import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin


class Fill(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return np.nan_to_num(np.asarray(X, float))


def all_features(request):
    return {name: request[name] for name in ("plan", "age", "active")}
""",
}
FIELDS = (
    Field("customer", "string", "Number", "C-1"),
    Field("plan", "category", "Plan", "free", nullable=True, categories=("free", "pro", "team", "gold")),
    Field("age", "number", "Years", 44.0, nullable=True),
    Field("active", "boolean", "Whether active", True),
)
CLASSES = ("low", "mid", "top")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project with a network and a step of a pipeline; this process works in it"
    root = tmp_path_factory.mktemp("shop")
    (root / "shop").mkdir()
    for name, text in CODE.items():
        (root / f"shop/{name}.py").write_text(text)
    (root / "pyproject.toml").write_text('[project]\nname = "shop"\n[tool.mlnb]\npackage = "shop"\n')
    sys.path.insert(0, str(root))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root
    sys.path.remove(str(root))


def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    plans, ages = rng.choice(["free", "pro", "team"], ROWS), rng.uniform(18, 80, ROWS).round(1)
    ages[::9] = np.nan
    return pd.DataFrame({"plan": pd.Categorical(plans), "age": ages, "active": rng.random(ROWS) < 0.5})


def targets(frame: pd.DataFrame) -> dict:
    value = frame["age"].fillna(50) * 1000 + 5000 * (frame["plan"] == "pro") + 2000 * frame["active"]
    return {
        "binary": (value > 52_000).astype(int).to_numpy(),
        "multiclass": np.array(CLASSES)[np.digitize(value, [40_000, 60_000])],
        "regression": value.to_numpy(),
    }


PROBLEMS = {"binary": Binary(), "multiclass": Multiclass(("top", "low", "mid")), "regression": Regression()}


def sklearn_model(kind, frame, target):
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    last = {"binary": LogisticRegression(), "multiclass": RandomForestClassifier(5), "regression": LinearRegression()}
    encode = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["plan"]), (SimpleImputer(), ["age"]), ("passthrough", ["active"])
    )
    pipeline = make_pipeline(encode, last[kind]).fit(frame, target)
    answer = pipeline.predict if kind == "regression" else pipeline.predict_proba
    return SklearnModel(pipeline, frame), answer


def lightgbm_model(kind, frame, target):
    lightgbm = pytest.importorskip("lightgbm")
    estimator = lightgbm.LGBMRegressor if kind == "regression" else lightgbm.LGBMClassifier
    fitted = estimator(n_estimators=5, num_leaves=7, verbosity=-1, n_jobs=1).fit(frame, target)
    return LightGBMModel(fitted, frame), fitted.predict if kind == "regression" else fitted.predict_proba


def xgboost_model(kind, frame, target):
    xgboost = pytest.importorskip("xgboost")
    schema = FeatureSchema.fit(frame)
    names = sorted(set(target.tolist())) if kind == "multiclass" else None
    labels = np.searchsorted(names, target) if names else target
    objective = {"binary": "binary:logistic", "multiclass": "multi:softprob", "regression": "reg:squarederror"}[kind]
    matrix_of = lambda rows: schema.matrix({name: np.asarray(rows[name]) for name in rows})
    matrix = matrix_of(frame)
    data = xgboost.DMatrix(matrix, labels, feature_types=["c", "float", "float"], enable_categorical=True)
    parameters = {"objective": objective, "max_depth": 3, "nthread": 1} | ({"num_class": 3} if names else {})
    booster = xgboost.train(parameters, data, 5)
    return XGBoostModel(booster, schema, classes=names or ()), lambda rows: booster.inplace_predict(matrix_of(rows))


def onnx_model(kind, frame, target):
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    outputs, rng = 3 if kind == "multiclass" else 1, np.random.default_rng(0)
    weights = rng.normal(size=(2, outputs)).astype(np.float32) / 50
    last = {"binary": "Sigmoid", "multiclass": "Softmax", "regression": "Identity"}[kind]
    nodes = [
        helper.make_node("IsNaN", ["age"], ["missing"]),
        helper.make_node("Where", ["missing", "fifty", "age"], ["filled"]),
        helper.make_node("Concat", ["filled", "active"], ["x"], axis=1), helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node(last, ["z"], ["answer"]), helper.make_node("Identity", ["z"], ["label"]),
    ]  # fmt: skip
    column = lambda name, width=1: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32(50), "fifty")]
    ends = [column("label", outputs), column("answer", outputs)]
    graph = helper.make_graph(nodes, "toy", [column("age"), column("active")], ends, constants)
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    classes = {"binary": (0, 1), "multiclass": CLASSES, "regression": ()}[kind]
    return OnnxModel(content, frame, output="answer", classes=classes), None


def torch_model(kind, frame, target):
    import torch
    from shop.nets import Net

    torch.manual_seed(0)
    config = {"width": 8, "outputs": 3 if kind == "multiclass" else 1}
    classes = {"binary": (0, 1), "multiclass": CLASSES, "regression": ()}[kind]
    return TorchModel(Net(**config), frame, config=config, classes=classes), None


def tabular_model(kind, frame, target):
    from mlnb.models.training import TrainingConfig, fit

    columns = {name: frame[name].to_numpy() for name in ("age", "active")} | {"plan": frame["plan"].to_numpy(str)}
    config = TrainingConfig(epochs=3, width=8, embedding=2, batch=32, device="cpu")
    trained = fit(columns, target, columns, target, ["plan"], ["age", "active"], config, problem=PROBLEMS[kind])
    return trained.predictor, None


MAKE = {
    "sklearn": sklearn_model, "lightgbm": lightgbm_model, "xgboost": xgboost_model, "onnx": onnx_model,
    "torch": torch_model, "tabular": tabular_model,
}  # fmt: skip


def samples(frame: pd.DataFrame) -> Samples:
    "Rows as a service sends them, one with a plan that was never seen and one without"
    plan = frame["plan"].astype(object).to_numpy().astype(str)[:24]
    plan[:2] = "gold", ""
    others = {name: frame[name].to_numpy()[:24] for name in ("age", "active")}
    return Samples({"customer": np.array([f"C-{i}" for i in range(24)]), "plan": plan} | others)


def bundle_of(folder, model, frame, **more):
    if isinstance(model, TabularPredictor):
        more |= {"request_features": "shop.steps.all_features"}
    about = {"name": "shop", "version": "v1", "request": FIELDS, "samples": samples(frame), "training": {}}
    return write_bundle(folder, predictor=model, **(about | more))


@pytest.fixture(scope="module")
def bundles(project):
    "Bundles of each library for each problem, with the adapter and the library's own predictions"
    frame, made = table(), {}
    for name, make in MAKE.items():
        for kind, target in targets(frame).items():
            try:
                model, answer = make(kind, frame, target)
            except pytest.skip.Exception:
                continue
            bundle = bundle_of(project / f"{name}-{kind}", model, frame, problem=PROBLEMS[kind])
            made[name, kind] = bundle, model, answer
    return made


IN_ANOTHER_PROCESS = """
import json, sys
from mlnb.models.bundle import Bundle
for folder in sys.argv[1:]:
    bundle = Bundle.load(folder)
    print(json.dumps([folder, bundle.self_test(), "torch" in sys.modules]))
"""


def test_another_process_predicts_the_same_bits(project, bundles):
    folders = sorted((f"{name}-{kind}" for name, kind in bundles), key=lambda f: "torch" in f)
    done = toy_project.run(project, "-c", IN_ANOTHER_PROCESS, *folders)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[f, 24, "torch" in f] for f in folders]


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", MAKE)
def test_a_bundle_answers_as_its_library_does(bundles, name, kind):
    if (name, kind) not in bundles:
        pytest.skip(f"{name} is not installed")
    bundle, model, answer = bundles[name, kind]
    frame = table()
    request = samples(frame).requests
    features = bundle.features(dict(request), {})
    outputs = bundle.outputs(features)
    alone = [bundle.outputs({name: column[[i]] for name, column in features.items()}) for i in range(24)]
    for field, column in outputs.items():
        assert np.array_equal(np.concatenate([a[field] for a in alone]), column)  # a row alone and among others
    assert bundle.problem == PROBLEMS[kind] and [f.name for f in bundle.problem.output] == list(outputs)
    assert set(features) <= {"plan", "age", "active"} and not bundle.problem.invalid(outputs).any()
    if answer is not None:
        values = np.atleast_2d(answer(frame.iloc[2:24]).T).T
        expected = values[:, [2, 0, 1] if kind == "multiclass" else -1]  # low, mid, top in alphabetical order
        got = outputs[{"multiclass": "probabilities", "regression": "prediction"}.get(kind, "probability")][2:]
        assert np.allclose(got, expected, 1e-8, 1e-9) if name == "sklearn" else np.array_equal(got, expected)
    if name in ("sklearn", "lightgbm", "xgboost"):
        importance = bundle.manifest.training["feature_importance"]
        assert list(importance.values()) == sorted(model.feature_importance().values(), reverse=True)


def refused(bundles, name, kind="binary"):
    return bundles.get((name, kind)) or pytest.skip(f"{name} is not installed")


def change(project, source, target, file, edit):
    "A copy of a bundle with a changed file that its manifest lists as it is"
    copy = shutil.copytree(project / source, project / target, dirs_exist_ok=True)
    (copy / file).write_bytes(content := edit((copy / file).read_bytes()))
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["files"][file] = sha256(content).hexdigest()
    (copy / "bundle.json").write_text(json.dumps(manifest))
    return copy


def test_a_flipped_byte_is_refused(project, bundles):
    for name, kind in bundles:
        file = max((project / f"{name}-{kind}/model").iterdir(), key=lambda p: p.name)
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match="has changed since it was written"):
            Bundle.load(project / f"{name}-{kind}")
        file.write_bytes(content)


ADAPTERS = [name for name in MAKE if name != "tabular"]  # which has tests of its own


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("edit", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\\0" * 99])
def test_a_corrupt_file_is_one_sentence(project, bundles, name, edit):
    model = refused(bundles, name)[1]
    with pytest.raises(BundleError) as error:
        Bundle.load(change(project, f"{name}-binary", "corrupt", f"model/{model.file}", edit))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_file_of_another_number_of_features_is_refused(project, bundles, name):
    refused(bundles, name)
    one_feature = lambda state: state | {"features": {"columns": state["features"]["columns"][:1]}}
    drop = lambda data: json.dumps(one_feature(json.loads(data))).encode()
    with pytest.raises(BundleError, match=r"model/|forward"):
        Bundle.load(change(project, f"{name}-binary", "narrow", "model/adapter.json", drop))


def fitted(estimator, target=None):
    frame = table()[["age"]].fillna(50.0)
    return estimator.fit(frame, targets(table())["regression"] if target is None else target)


def test_what_an_adapter_cannot_use_is_named(project, tmp_path):
    from shop.steps import Fill
    from sklearn.ensemble import VotingRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer
    from sklearn.svm import LinearSVC

    frame, words = table()[["age"]].fillna(50.0), np.where(np.arange(ROWS) % 2, "yes", "no")
    wrong = {
        "is not a fitted estimator": lambda: SklearnModel(Ridge(), frame),
        "has no predict_proba.*CalibratedClassifierCV": lambda: SklearnModel(fitted(LinearSVC(), words), frame),
        r"name the positive one last: classes=\('no', 'yes'\)": lambda: SklearnModel(
            fitted(LogisticRegression(), words), frame
        ),
        "'age' does not fit": lambda: SklearnModel(fitted(Ridge()), table()[["active"]]),
        "it is a regressor": lambda: SklearnModel(fitted(Ridge()), frame, problem=Binary()),
        "cannot be read": lambda: OnnxModel(tmp_path / "missing.onnx", frame),
    }
    for says, make in wrong.items():
        with pytest.raises(MlnbError, match=says):
            make()
    about = {"request": FIELDS[2:3], "samples": Samples({"age": np.array([20.0, 30.0])})}
    step = make_pipeline(FunctionTransformer(pd.DataFrame.abs), Ridge())
    with pytest.raises(BundleError, match=r"'pandas.core.generic' to trusted_packages"):
        bundle_of(tmp_path / "bundle", SklearnModel(fitted(step), frame), table(), **about)
    for estimator in (make_pipeline(Fill(), Ridge()), VotingRegressor([("a", Ridge()), ("b", Ridge(2))])):
        bundle = bundle_of(tmp_path / "bundle", SklearnModel(fitted(estimator), frame), table(), **about)
        own = [reference.name for reference in bundle.manifest.model_code]
        assert own == (["shop.steps.Fill"] if hasattr(estimator, "steps") else [])


def test_another_version_of_the_library(project, bundles, monkeypatch):
    refused(bundles, "lightgbm")
    copy = change(project, "lightgbm-binary", "older", "model/adapter.json", lambda data: data)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["packages"]["lightgbm"] = "3.0"
    (copy / "bundle.json").write_text(json.dumps(manifest))
    assert Bundle.load(copy).self_test() == 24  # which agrees bit for bit
    samples = json.loads((copy / "samples.json").read_text())
    samples["outputs"]["probability"][3] = 0.123
    (copy / "samples.json").write_text(text := json.dumps(samples))
    manifest["files"]["samples.json"] = sha256(text.encode()).hexdigest()
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"sample 3 .* it was trained with lightgbm 3.0, here is 4"):
        Bundle.load(copy)


def test_mlflow_predicts_what_the_bundle_answers(project, bundles, tmp_path, monkeypatch):
    from mlflow import pyfunc
    from mlflow.models import get_model_info

    from mlnb.models.registry import Tracking

    tracking = Tracking(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.url)
    frame = pd.DataFrame(samples(table()).requests).replace({"plan": {"": None}})
    for name, kind in (("sklearn", "binary"), ("torch", "multiclass"), ("onnx", "regression")):
        bundle, *_ = refused(bundles, name, kind)
        with tracking.run("shop") as run:
            version = tracking.register("shop", bundle.folder, run)
        model = pyfunc.load_model(uri := f"models:/shop/{version}")
        expected = bundle.outputs(bundle.features(dict(samples(table()).requests), {}))
        answers, example = model.predict(frame), model.predict(model.input_example)
        assert list(answers) == list(expected) == [c.name for c in get_model_info(uri).signature.outputs]
        for field, column in expected.items():
            assert np.array_equal(np.array(answers[field].tolist()), column)
            assert np.array_equal(np.array(example[field].tolist()), column[:5])
        assert model.metadata.signature.inputs.input_names() == [*(f.name for f in FIELDS), "decision_time"]
        copy = tracking.download("shop", version, tmp_path / f"copy-{version}")
        assert Bundle.load(copy).self_test() == 24
    with pytest.raises(Exception, match="age"):
        model.predict(frame.assign(age="old"))
    with pytest.raises(MlnbError, match=r"row 0: plan .platinum. is not one of"):
        model.predict(frame.assign(plan="platinum"))


@pytest.mark.long
def test_mlflow_serves_what_the_bundle_answers(project, bundles, tmp_path):
    import httpx
    from waiting import free_port, wait_until_ready

    from mlnb.models.registry import Tracking

    bundle, *_ = refused(bundles, "lightgbm", "multiclass")
    tracking = Tracking(f"sqlite:///{tmp_path}/mlflow.db")
    with tracking.run("shop") as run:
        tracking.register("shop", bundle.folder, run)
    port, env = free_port(), toy_project.environment(project) | {"MLFLOW_TRACKING_URI": tracking.url}
    command = ["-m", "mlflow", "models", "serve", "-m", "models:/shop/1", "--env-manager", "local", "-p", str(port)]
    process = subprocess.Popen([sys.executable, *command], cwd=project, env=env, start_new_session=True)
    try:
        url = wait_until_ready(process, f"http://127.0.0.1:{port}", "/ping")
        rows = bundle.samples["requests"]
        answers = httpx.post(f"{url}/invocations", json={"dataframe_records": rows}, timeout=60).json()["predictions"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    outputs = bundle.samples["outputs"]
    assert answers == [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]
