"""Where settings come from, and what `controls`, `config` and the help say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from localreason.cli.config import FIELDS, load
from localreason.cli.main import GROUPS, ExitCode, main
from localreason.runtime.errors import InputError


def write(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.toml").write_text(text)
    monkeypatch.setenv("LOCALREASON_CONFIG", "c.toml")


def test_flag_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch):
    write('seed = 1\nparallel = 1\ntop_k = 1\ncontrols = ["hint"]\ntemperature = 1', monkeypatch)
    monkeypatch.setenv("LOCALREASON_SEED", "2")
    monkeypatch.setenv("LOCALREASON_PARALLEL", "2")
    config = load({"seed": 3, "not_a_setting": 1, "top_p": None})
    assert (config.settings.seed, config.settings.parallel, config.settings.top_k) == (3, 2, 1)
    assert config.settings.controls == ("hint",)
    assert config.settings.temperature == 1.0
    assert [config.origins[name] for name in ("seed", "parallel", "top_k", "top_p")] == [
        "flag",
        "environment LOCALREASON_PARALLEL",
        "file c.toml",
        "default",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zzz = 1", "c.toml: 'zzz' is not a setting; there are .*top_p"),
        ("sed = 1", "c.toml: 'sed' is not a setting; do you mean 'seed'?"),
        ('seed = "x"', "seed is 'x'; give a whole number"),
        ("seed = true", "give a whole number"),
        ("think = 1", "give true or false"),
        ("controls = [1]", "give a list of texts"),
        ("top_p = 2", "top_p is 2.0; give a value from 0 to 1"),
        ("seed = ", "not valid TOML"),
        ('cache_type = "q9"', "choose one of f16"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(text: str, words: str, monkeypatch: pytest.MonkeyPatch):
    write(text, monkeypatch)
    with pytest.raises(InputError, match=words):
        load({})
    assert main(["config", "show"]) == ExitCode.INPUT


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCALREASON_THINK", "maybe")
    with pytest.raises(InputError, match="LOCALREASON_THINK is 'maybe'; give true or false"):
        load({})


def test_a_named_file_must_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCALREASON_CONFIG", "none.toml")
    with pytest.raises(InputError, match=r"none\.toml, which does not exist"):
        load({})


def test_config_show_tells_every_origin(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCALREASON_CONTROLS", "hint search:n=2")
    assert main(["config", "show", "--json"]) == ExitCode.OK
    shown = json.loads(capfd.readouterr().out)
    assert set(shown) == set(FIELDS)
    assert shown["controls"] == {"value": ["hint", "search:n=2"], "origin": "environment LOCALREASON_CONTROLS"}
    assert main(["config", "show"]) == ExitCode.OK
    assert main(["config", "path"]) == ExitCode.OK
    assert capfd.readouterr().out.endswith("config.toml\n")


def test_controls_are_listed_with_source_and_limits(capfd: pytest.CaptureFixture[str]):
    assert main(["controls", "--json"]) == ExitCode.OK
    known = json.loads(capfd.readouterr().out)
    assert {"budget", "hint", "suppress", "search"} == {control["name"] for control in known["controls"]}
    assert all(control["source"] and control["parameters"] for control in known["controls"])
    assert main(["controls", "budget"]) == ExitCode.OK
    assert "max=4096" in capfd.readouterr().out
    assert main(["controls", "bogus"]) == ExitCode.USAGE


@pytest.mark.parametrize("group", list(GROUPS))
def test_every_group_has_help_with_an_example(group: str, capfd: pytest.CaptureFixture[str]):
    assert main([group, "--help"]) == ExitCode.OK
    assert "localreason" in capfd.readouterr().out


def test_help_of_all_imports_nothing_heavy():
    code = (
        "import sys; from localreason.cli.main import main; main(['--help']);"
        "print(*{'numpy', 'rich', 'llama_cpp', 'huggingface_hub'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


def test_version_is_the_installed_one(capfd: pytest.CaptureFixture[str]):
    assert main(["--version"]) == ExitCode.OK
    assert capfd.readouterr().out.startswith("localreason ")


def test_what_goes_into_a_pipe_is_utf8():
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "LOCALREASON_MODEL": "数.gguf"}
    command = [sys.executable, "-c", "from localreason.cli.main import run; run()", "config", "show"]
    shown = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    assert "数.gguf" in shown.decode()


def test_a_closed_standard_output_is_no_bug():
    command = [sys.executable, "-c", "from localreason.cli.main import run; run()", "config", "show"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
