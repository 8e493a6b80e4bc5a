"""Secrets are planted where users have them; then everything shown or written is searched, and its modes are read."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import toy_project
import warm_cli
from pipeline_project import make, notebook
from uvicorn_process import run_server
from waiting import until

from mlnb.cli.main import _os_error_text
from mlnb.doctor import stores, variables
from mlnb.notebooks import kernels
from mlnb.pipelines import plan_cache
from mlnb.project.errors import MlnbError, TrackingError
from mlnb.project.permissions import UMASKS, apply_file_permissions
from mlnb.project.secrets import redact
from mlnb.project.settings import Settings, load_settings

PLANT = "plant3d"  # in every secret, and nowhere else
DATABASE = f"postgresql://ada:{PLANT}-db@127.0.0.1:9/records"
SERVER = f"http://ada:{PLANT}-tracking@127.0.0.1:9"
BUCKET = f"s3://key:{PLANT}-s3@bucket/folder"
KEY = f"{PLANT}-key-of-a-caller-0123456789abcdef"
VARIABLES = {
    "MLNB_KEYS": f"predict:{KEY},admin:{PLANT}-key-of-an-admin-0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": f"{PLANT}-aws",
    "MLFLOW_TRACKING_PASSWORD": f"{PLANT}-mlflow",
    "OPS_WEBHOOK": f"http://127.0.0.1:9/{PLANT}-webhook",
    "PIP_INDEX_URL": f"https://ci:{PLANT}-pip@127.0.0.1:9/simple",
}
HOOKS = """
[tool.mlnb.alerts.runs]
kind = "runs"
[tool.mlnb.channels.ops]
kind = "webhook"
url = "$OPS_WEBHOOK"
"""
IMPORTS = "from mlnb.models.registry import Tracking\nfrom mlnb.project.settings import load_settings"
SHOWS = "import os\nprint('keys:', os.environ.get('MLNB_KEYS'))\nsettings = load_settings()\nsettings"
FAILS = "Tracking(settings.url(settings.tracking)).version_of('flights', 'champion')"


def content(path: Path) -> bytes:
    "What a file holds; nothing where it is gone: kernels of other tests come and go"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def planted(*folders: Path) -> list[str]:
    "Files that hold a secret"
    below = (
        Path(root, name) for folder in folders for root, _, names in os.walk(folder) for name in names
    )  # files may go meanwhile
    files = [path for path in below if path.is_file() and not path.is_symlink()]
    return [str(p) for p in files if PLANT.encode() in content(p)]


def open_to_others(folder: Path) -> list[str]:
    "What others may do anything with, below a folder"
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_symlink() and p.stat().st_mode & 0o077]


def command(root, *words, mask=0o022, **variables):
    "`mlnb WORDS` with every secret in its variables; none is shown"
    env = toy_project.environment(root) | VARIABLES | {"MLNB_RUNTIME_DIR": os.environ["MLNB_RUNTIME_DIR"]} | variables
    done = warm_cli.run(words, cwd=root, env=env, umask=mask)
    assert PLANT not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project after a run with every secret in its variables, in which a task failed with a URL in its error"
    root = make(tmp_path_factory.mktemp("secrets") / "project")
    (root / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + HOOKS)
    notebook(root / "nbs" / "other.ipynb", "upstream = None\nproduct = None", IMPORTS, SHOWS, FAILS)
    done = command(root, "run", "-k", mask=0, MLNB_TRACKING=SERVER, MLNB_TRACK_RUNS="true")
    assert done.returncode == 1 and "Task other failed" in done.stderr and "http://ada:***@127.0.0.1:9" in done.stderr
    until(lambda: [p for p in root.glob(".mlnb/runs/*/mlflow.log") if "tries again" in p.read_text()], "the tracker")
    return root


def test_a_run_writes_no_secret_and_leaves_nothing_open(project):
    assert planted(project, Path(os.environ["MLNB_RUNTIME_DIR"])) == []
    assert open_to_others(project / ".mlnb") == []
    assert stat.S_IMODE(os.stat(os.environ["MLNB_RUNTIME_DIR"]).st_mode) == 0o700, "nobody gets at what is in there"
    assert stat.S_IMODE((project / ".mlnb").stat().st_mode) == 0o755, "others reach the data in it, and rename nothing"
    assert stat.S_IMODE((project / "out" / "data.txt").stat().st_mode) == 0o666, "products follow the umask"
    kept = next(project.glob(".mlnb/runs/*/other.ipynb")).read_text()
    assert "http://ada:***@127.0.0.1:9" in kept and "tracking='http://ada:***@" in kept
    assert "keys: None" in kept, "a task has no use for the keys of the service"


@pytest.mark.parametrize(
    ("words", "variables"),
    [
        (("runs", "show"), {}),
        (("runs",), {"MLNB_RECORDS": DATABASE}),
        (("plan", "--json"), {"MLNB_RECORDS": DATABASE, "MLNB_TRACKING": SERVER, "MLNB_STORAGE": BUCKET}),
        (("alerts", "check"), {}),
        (("predictions",), {"MLNB_STORAGE": f"nosuch://key:{PLANT}@bucket"}),
        (("compact",), {"MLNB_STORAGE": BUCKET}),
        (("runs",), {"MLNB_TRACKING": f"ftp//ada:{PLANT}@h", "MLNB_RECORDS": f"ada:{PLANT}@h"}),
    ],
    ids=str,
)
def test_no_command_shows_or_writes_one(project, words, variables):
    command(project, *words, **variables)
    assert planted(project / ".mlnb") == []


def test_doctor_shows_none(project, monkeypatch):
    for name, url in {"MLNB_RECORDS": DATABASE, "MLNB_TRACKING": SERVER, "MLNB_STORAGE": BUCKET}.items():
        monkeypatch.setenv(name, url)
    found = str([*stores(load_settings(project)), *variables(None)])
    assert "127.0.0.1:9 does not answer" in found and PLANT not in found


def test_a_service_keeps_no_key_and_its_data_follow_the_setting(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path / "project")
    shutil.rmtree(root / ".mlnb" / "outcomes", ignore_errors=True)  # of another test, with its modes
    for part in (root / ".mlnb" / "storage").rglob("*"):
        part.chmod(0o777)
    mask = os.umask(0)
    try:
        variables = VARIABLES | {"MLNB_FILE_MODE": "private", "MLNB_LOG_COMPACT_MINUTES": "0"}
        with run_server(root, root / ".mlnb/predictions", **variables) as (process, url):
            for key in (KEY, f"{PLANT}-wrong"):
                for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}, {}):
                    httpx.post(
                        f"{url}/predict?key={key}&token={key}",
                        json=toy_project.example(root),
                        headers=headers,
                        timeout=60,
                    )
            httpx.post(f"{url}/predict", json={"carrier": KEY}, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
            everyone = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
            arguments = [
                b"".join(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
                for pid in everyone
                if psutil.pid_exists(pid)
            ]
            assert arguments and not any(PLANT.encode() in line for line in arguments), (
                "anybody can read the arguments of a process"
            )
    finally:
        os.umask(mask)
    assert planted(root) == []
    assert [p for p in open_to_others(root / ".mlnb") if not p.startswith("storage/")] == []
    assert (
        list((root / ".mlnb/predictions").glob("*.jsonl"))
        and stat.S_IMODE((root / ".mlnb/storage").stat().st_mode) == 0o700
    )


@pytest.mark.parametrize("mode", ["private", "group", "umask"])
def test_data_and_products_follow_the_setting(tmp_path, mode):
    code = """
import sys
from pathlib import Path
from mlnb.project.files import write_atomic
from mlnb.project.permissions import make_folder, apply_file_permissions
from mlnb.project.settings import load_settings
apply_file_permissions(load_settings())
write_atomic(".mlnb/predictions/a.jsonl", "a")
write_atomic("products/scores.json", "{}")
write_atomic(".mlnb/tasks/pipeline/a.json", "{}")
"""
    (tmp_path / "pyproject.toml").write_text(f'[tool.mlnb]\nfile_mode = "{mode}"\n')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, umask=0o002)
    rights = 0o777 & ~UMASKS.get(mode, 0o002)
    for folder, file in ((".mlnb/predictions", "a.jsonl"), ("products", "scores.json")):
        modes = [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / folder, tmp_path / folder / file)]
        assert modes == [rights, rights & 0o666]
    assert open_to_others(tmp_path / ".mlnb/tasks") == []


def test_what_an_earlier_version_left_open_is_closed(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    for name in (
        "runs/1/train.ipynb",
        "tasks/pipeline/@manifest",
        "versions/v1/bundle.json",
        "records.db",
        "records.db-wal",
        "storage/a",
    ):
        (path := tmp_path / ".mlnb" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    outside = tmp_path / "outside"
    outside.write_text("x")
    (tmp_path / ".mlnb/runs/link").symlink_to(outside)
    for path in (tmp_path / ".mlnb", *(tmp_path / ".mlnb").rglob("*"), outside):
        path.chmod(0o777)
    apply_file_permissions(load_settings(tmp_path))
    assert [p for p in open_to_others(tmp_path / ".mlnb") if not p.startswith("storage")] == []
    assert outside.stat().st_mode & 0o777 == 0o777, "links are not followed"
    assert (tmp_path / ".mlnb").stat().st_mode & 0o777 == 0o755 and (
        tmp_path / ".mlnb/storage/a"
    ).stat().st_mode & 0o777 == 0o777


def test_a_manifest_of_an_earlier_version_goes(tmp_path):
    settings = Settings(tmp_path, "planes")
    plan_cache.write(settings, (), {})
    path, text = plan_cache.path(settings), plan_cache.path(settings).read_text()
    body = text.partition("\n")[2].replace(f'"{plan_cache.key(settings, ())}"', f'[1,"{PLANT}"]')
    path.write_text(f"{plan_cache.crc32(body.encode())}\n{body}")
    assert plan_cache.read(settings) is None and not path.exists()


def test_a_manifest_can_be_compared_and_not_guessed(tmp_path, monkeypatch):
    one, other = (Settings(tmp_path / name, "planes", records=DATABASE) for name in ("a", "b"))
    key = plan_cache.key(one, ())
    monkeypatch.setenv("MLNB_KEYS", "predict:another")
    assert plan_cache.key(one, ()) == key, "new keys of the service change no task"
    assert plan_cache.key(Settings(tmp_path / "a", "planes", records=DATABASE + "2"), ()) != key
    assert (
        plan_cache.key(other, ()).isalnum() and stat.S_IMODE((tmp_path / "a/.mlnb/tasks/@salt").stat().st_mode) == 0o600
    )


@pytest.mark.parametrize(
    "text",
    [
        f"could not connect to postgresql+psycopg://ada:{PLANT}@h/db and gave up",
        f"postgresql://ada:pass@{PLANT}/x@h/db",
        f"https://{PLANT}@github.com/a/b.git",
        f"redis://:{PLANT}@h:6379/0",
        f"setting 'records' has value 'postgresql//ada:{PLANT}@h/db'",
        f"https://blob.example.org/c?sv=2024&sig={PLANT}&se=2026",
        f"https://s3.example.org/k?X-Amz-Signature={PLANT}&X-Amz-Date=1",
        f"mssql://h/db?user=sa&password={PLANT}",
        f"connection string: host=db password={PLANT} port=1",
        f"DefaultEndpointsProtocol=https;AccountKey={PLANT};",
        f"Authorization: Bearer {PLANT}",
        f"{{'Authorization': 'Basic {PLANT}=='}}",
    ],
)
def test_credentials_are_hidden_wherever_they_stand(text):
    assert PLANT not in redact(text) and "***" in redact(text)
    assert PLANT not in str(MlnbError(text)) and PLANT not in str(TrackingError(text))


@pytest.mark.parametrize(
    "text",
    [
        "task 'train' failed in cell [3]: KeyError: 'token'",
        "postgresql://ada@db/mlnb does not answer",
        "write to ada@example.org or mailto:ada@example.org at 12:30, see https://example.org/a?page=2&key=value#top",
        "setting 'keys_required' has value 3; write keys_required = false",
        "assert tokens == 5, and secret sauce",
        "",
    ],
)
def test_ordinary_sentences_stay_as_they_are(text):
    assert redact(text) == text


@pytest.mark.parametrize("planted_by", ["another user", "a link", "wide modes", "a file"])
@pytest.mark.parametrize("variable", ["MLNB_RUNTIME_DIR", "XDG_RUNTIME_DIR", "TMPDIR"])
def test_a_folder_for_sockets_that_somebody_planted_is_not_used(tmp_path, planted_by, variable):
    folder = {
        "MLNB_RUNTIME_DIR": tmp_path,
        "XDG_RUNTIME_DIR": tmp_path / "mlnb",
        "TMPDIR": tmp_path / f"mlnb-{os.getuid()}",
    }[variable]
    folder = folder / "sockets" if variable == "MLNB_RUNTIME_DIR" else folder
    environment = {variable: str(folder if variable == "MLNB_RUNTIME_DIR" else tmp_path)}
    if planted_by == "a link":
        (tmp_path / "real").mkdir(0o700)
        folder.symlink_to(tmp_path / "real")
    elif planted_by == "a file":
        folder.touch()
    else:
        folder.mkdir(0o700)
        folder.chmod(0o777 if planted_by == "wide modes" else 0o700)
    if planted_by == "another user":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 65534, 65534)
    with pytest.raises(kernels.ColdStart):
        kernels.runtime_folder(environment)


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_what_belongs_to_another_user_is_explained(error):
    text = _os_error_text(error(13 if error is PermissionError else 2, "Refused", "/p/.mlnb/locks/pipeline.lock"))
    assert text.startswith("Refused: /p/.mlnb/locks/pipeline.lock") and ("run mlnb as that user" in text) == (
        error is PermissionError
    )


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_reads_nothing(project):
    folder = project
    while folder != Path("/tmp"):  # pytest closes its own folders
        folder.chmod(folder.stat().st_mode | 0o055)
        folder = folder.parent
    read = "import os, sys; os.setuid(65534); print(*[open(p, 'rb').read() for p in sys.argv[1:]])"
    files = [*project.glob(".mlnb/tasks/*/*"), *project.glob(".mlnb/*.db*"), *project.glob(".mlnb/runs/*/*")]
    for file in files:
        done = subprocess.run([sys.executable, "-c", read, str(file)], capture_output=True, text=True)
        assert "PermissionError" in done.stderr, file
    done = subprocess.run([sys.executable, "-c", read, str(project / "out/data.txt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
