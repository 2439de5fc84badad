from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from impasto.cli import app
from impasto.cli.options import Json
from impasto.core.errors import UserError
from tests.cli.running import impasto

HEAVY = "{'torch', 'diffusers', 'transformers', 'rich', 'numpy', 'PIL'} & set(sys.modules)"


def run(monkeypatch: pytest.MonkeyPatch, function, *arguments: str) -> int:
    """The exit code of a verb made of `function`, in this process."""
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "verb_under_test", function, raising=False)
    monkeypatch.setitem(app.VERBS, "verb", (f"{__name__}:verb_under_test", "For a test."))
    with pytest.raises(SystemExit) as ended:
        app.main(["verb", *arguments])
    return ended.value.code or 0


def test_a_user_error_is_one_line_and_exit_1(monkeypatch, capsys) -> None:
    def verb() -> None:
        raise UserError("is a cat", where="dog.png", fix="take a dog")

    assert run(monkeypatch, verb) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: dog.png: is a cat; take a dog\n")


def test_a_user_error_of_several_lines_becomes_one(monkeypatch, capsys) -> None:
    def verb() -> None:
        raise UserError("first\nsecond")

    assert run(monkeypatch, verb) == 1
    assert capsys.readouterr().err == "error: first second\n"


def test_a_user_error_as_json(monkeypatch, capsys) -> None:
    def verb(as_json: Json = False) -> None:
        raise UserError("is a cat", where="dög.png", fix="take a dog")

    assert run(monkeypatch, verb, "--json") == 1
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"error": {"what": "is a cat", "where": "dög.png", "fix": "take a dog"}}
    assert shown.isascii()


def test_ctrl_c_is_a_clean_line_and_exit_130(monkeypatch, capsys) -> None:
    def verb() -> None:
        raise KeyboardInterrupt

    assert run(monkeypatch, verb) == 130
    assert capsys.readouterr().err.strip() == "stopped"


def test_a_defect_shows_its_traceback(monkeypatch) -> None:
    def verb() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules[__name__], "verb_under_test", verb, raising=False)
    monkeypatch.setitem(app.VERBS, "verb", (f"{__name__}:verb_under_test", "For a test."))
    with pytest.raises(ZeroDivisionError):
        app.main(["verb"])


@pytest.mark.parametrize(("arguments", "told"), [
    (["dcotor"], "did you mean 'doctor'?"),
    (["doctor", "--jsn"], "--json"),
    (["doctor", "surplus"], "surplus"),
    (["generate"], "BASE"),
    (["generate", "base", "a dog", "--steps", "many"], "--steps"),
    (["generate", "base", "a dog", "--size", "wide"], "512x768"),
    (["generate", "base", "a dog", "--dtype", "fp8"], "bf16"),
])
def test_wrong_use_is_exit_2_and_says_what(arguments, told, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert told in shown.err and "Traceback" not in shown.err
    assert shown.out == ""


def verbs_of(verb: str) -> dict[str, tuple[object, str]]:
    """The words that call a verb, or each verb under it: its function, and its line in the list."""
    where, line = app.VERBS[verb]
    module, name = where.split(":")
    found = getattr(importlib.import_module(module), name)
    if not isinstance(found, typer.Typer):
        return {verb: (found, line)}
    assert found.registered_callback is not None
    assert inspect.getdoc(found.registered_callback.callback) == line
    return {f"{verb} {command.name}": (command.callback, (inspect.getdoc(command.callback) or "").splitlines()[0])
            for command in found.registered_commands}


@pytest.mark.parametrize("verb", app.VERBS)
def test_each_verb_is_there_and_says_the_same_of_itself_in_both_places(verb, capsys) -> None:
    for words, (function, line) in verbs_of(verb).items():
        assert (inspect.getdoc(function) or "").splitlines()[0] == line
        assert "as_json" in inspect.signature(function).parameters  # every verb has --json
        with pytest.raises(SystemExit) as ended:
            app.main([*words.split(), "--help"])
        assert ended.value.code == 0
        assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], *([verb, "--help"] for verb in app.VERBS),
                                       ["dataset", "check", "--help"]])
def test_help_imports_nothing_heavy(arguments) -> None:
    code = (f"import sys\nfrom impasto.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass\n"
            f"print(sorted({HEAVY}), file=sys.stderr)")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stderr.strip() == "[]"
    assert shown.stdout


def test_help_lists_each_verb_and_fits_a_narrow_terminal() -> None:
    shown = impasto("--help", COLUMNS="50")
    assert shown.returncode == 0
    assert all(verb in shown.stdout for verb in app.VERBS)
    assert max(map(len, shown.stdout.splitlines())) <= 50
    assert "\x1b" not in shown.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", "from impasto.cli import app; import sys\n"
                                "def many():\n for i in range(100000): print('line', i)\n"
                                "sys.modules['here'] = type(sys)('here'); sys.modules['here'].many = many\n"
                                "app.VERBS['many'] = ('here:many', '')\napp.main(['many'])"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(4)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 1


def test_a_code_page_without_the_characters_ends_nothing(tmp_path: Path) -> None:
    there = tmp_path / "猫.safetensors"
    there.write_bytes(b"no")
    shown = impasto("inspect", there, PYTHONIOENCODING="ascii")
    assert shown.returncode == 1 and "Traceback" not in shown.stderr
    assert "??" not in shown.stderr and "?.safetensors" in shown.stderr


def test_the_module_and_the_script_are_one() -> None:
    import impasto as package

    assert impasto("--version").stdout == f"impasto {package.__version__}\n"


def test_arguments_reach_the_verb_as_they_are(monkeypatch, capsys) -> None:
    def verb(words: list[str]) -> None:
        print(words)

    monkeypatch.setenv("IMPASTO_TEST_WORD", "expanded")
    assert run(monkeypatch, verb, "*", "$IMPASTO_TEST_WORD", "~", "--", "-x") == 0
    assert capsys.readouterr().out.strip() == "['*', '$IMPASTO_TEST_WORD', '~', '-x']"


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}])
def test_threads_sleep_soon_where_they_wait_unless_told_otherwise(own: dict[str, str], monkeypatch) -> None:
    def verb() -> None:
        pass

    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items()
                                        if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | own)
    before = dict(os.environ)
    assert run(monkeypatch, verb) == 0
    set_now = {key: value for key, value in os.environ.items() if before.get(key) != value}
    assert set_now == ({} if own else {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"})
