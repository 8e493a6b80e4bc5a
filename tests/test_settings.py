"""Settings: every source, every mistake."""

import pytest

from mlnb.project.errors import SettingError
from mlnb.project.settings import load_settings


@pytest.fixture
def project(tmp_path, monkeypatch):
    for variable in ("MLNB_ROOT", "MLNB_ENV", "MLNB_PORT", "MLNB_STORAGE"):
        monkeypatch.delenv(variable, raising=False)

    def write(table: str):
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "flight-delays"\n[tool.mlnb]\n{table}')
        return tmp_path

    return write


def test_defaults_need_no_server(project):
    settings = load_settings(project(""))
    assert settings.package == "flight_delays"
    assert settings.url(settings.records) == f"sqlite:///{settings.root}/.mlnb/records.db"
    assert settings.url(settings.storage) == f"{settings.root}/.mlnb/storage"


FROM_ONE_ON = ("max_queued_requests", "request_timeout_seconds", "body_limit_kb", "snapshot_max_age_minutes")


def test_later_words_win(project, monkeypatch):
    root = project('port = 1\nstorage = "a"\n[tool.mlnb.env.production]\nport = 2\nstorage = "b"\n')
    assert load_settings(root).port == 1
    assert load_settings(root, env="production").port == 2
    monkeypatch.setenv("MLNB_ENV", "production")
    monkeypatch.setenv("MLNB_PORT", "3")
    assert (load_settings(root).port, load_settings(root).storage) == (3, "b")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("prot = 1", "unknown setting 'prot' (did you mean 'port'?)"),
        ('port = "many"', "setting 'port' has value 'many'; write port = 3000"),
        ("port = true", "setting 'port' has value True"),
        ('records = ""', "setting 'records' has value ''; write records ="),
        (
            'log_on_failure = "ignore"',
            """setting 'log_on_failure' has value 'ignore'; write log_on_failure = "refuse" or "serve\"""",
        ),
        ("log_rotate_mb = 0", "setting 'log_rotate_mb' has value 0; write log_rotate_mb = 64"),
        (
            "challenger_percent = 150",
            "setting 'challenger_percent' has value 150; write challenger_percent = 10, a whole number",
        ),
        ("jobs = -1", "setting 'jobs' has value -1; write jobs = 2"),
        ('tracking = "nope"', "setting 'tracking' has value 'nope'; write tracking ="),
        ('records = "nope"', "setting 'records' has value 'nope'; write records ="),
        (
            'predictions = "s3://bucket/log"',
            "setting 'predictions' has value 's3://bucket/log'; write predictions = \".mlnb",
        ),
        ('package = "my-flights"', "setting 'package' has value 'my-flights'; write package = \"flights\""),
        ("port = 0", "setting 'port' has value 0; write port = 3000, a free TCP port from 1 to 65535"),
        ("port = 65536", "setting 'port' has value 65536"),
        *(
            (f"{name} = {value}", f"setting '{name}' has value {value}; write {name} = ")
            for name in FROM_ONE_ON
            for value in (0, -1)
        ),
        ("port = = 1", "is not valid TOML"),
    ],
)
def test_a_mistake_names_the_setting_its_value_and_the_right_form(project, table, said):
    with pytest.raises(SettingError) as raised:
        load_settings(project(table))
    assert said in str(raised.value)


def test_an_environment_is_checked_when_it_is_chosen(project):
    root = project("[tool.mlnb.env.staging]\nprot = 1")
    assert load_settings(root).port == 3000
    with pytest.raises(SettingError, match="unknown setting 'prot'"):
        load_settings(root, env="staging")


def test_unknown_environment(project):
    with pytest.raises(SettingError, match=r"no environment 'prodution' \(did you mean 'production'\?\)"):
        load_settings(project("[tool.mlnb.env.production]\nport = 2"), env="prodution")


def test_wrong_variable(project, monkeypatch):
    monkeypatch.setenv("MLNB_PORT", "many")
    with pytest.raises(SettingError, match="variable MLNB_PORT has value 'many'"):
        load_settings(project(""))


def test_no_project(tmp_path, monkeypatch):
    monkeypatch.delenv("MLNB_ROOT", raising=False)
    with pytest.raises(SettingError, match="create one with: mlnb new NAME"):
        load_settings(tmp_path)
