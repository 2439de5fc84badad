"""A command line in every shell's way of writing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from impasto.core.errors import UserError
from impasto.training.foreign.kohya_command import arguments, read_command
from tests.training.foreign.importing import became, fate, imported, reason

HERE = Path("run.txt")
WANTED = {"pretrained_model_name_or_path": "my models/v1 5.safetensors", "output_name": "sks dog", "seed": "42",
          "network_args": ["conv_dim=4", "conv_alpha=1"], "flip_aug": True}

BASH = r'''
#!/bin/bash
# accelerate launch train_db.py --seed 1
cd ~/sd-scripts && source venv/bin/activate
accelerate launch --num_cpu_threads_per_process 1 train_network.py \
    --pretrained_model_name_or_path="my models/v1 5.safetensors" \
    --output_name 'sks dog' --seed=42 \
    --network_args "conv_dim=4" conv_alpha=1 --flip_aug
'''
ESCAPES = r'''python train_network.py --pretrained_model_name_or_path my\ models/v1\ 5.safetensors \
  --output_name="sks "'dog' --seed 42 --network_args conv_dim=4 conv_alpha=1 --flip_aug > log.txt 2>&1'''
CMD = r'''
@echo off
REM accelerate launch train_db.py
accelerate launch --num_cpu_threads_per_process=1 "C:\sd-scripts\train_network.py" ^
  --pretrained_model_name_or_path="my models/v1 5.safetensors" ^
  --output_name="sks dog" --seed=42 ^
  --network_args "conv_dim=4" "conv_alpha=1" --flip_aug
pause
'''
POWERSHELL = '''
accelerate launch .\\train_network.py `
  --pretrained_model_name_or_path 'my models/v1 5.safetensors' `
  --output_name "sks dog" --seed 42 --flip_aug `
  --network_args conv_dim=4 conv_alpha=1 | Tee-Object log.txt
'''
ONE_LINE = ("python3.10 -m accelerate.commands.launch ./train_network.py "
            "--pretrained_model_name_or_path=\"my models/v1 5.safetensors\" --output_name='sks dog' --seed=42 "
            "--network_args conv_dim=4 conv_alpha=1 --flip_aug && echo done")
VARIABLES = '''
export MODELS="my models"
NAME='sks dog'
CUDA_VISIBLE_DEVICES=0 accelerate launch train_network.py --pretrained_model_name_or_path="$MODELS/v1 5.safetensors" \\
  --output_name="${NAME}" --seed=42 --network_args conv_dim=4 conv_alpha=1 --flip_aug
'''
SET = '''
set MODELS=my models
set "NAME=sks dog"
accelerate launch train_network.py --pretrained_model_name_or_path="%MODELS%/v1 5.safetensors" ^
  --output_name="%NAME%" --seed=42 --network_args conv_dim=4 conv_alpha=1 --flip_aug
'''


@pytest.mark.parametrize("source", [BASH, ESCAPES, CMD, POWERSHELL, ONE_LINE, VARIABLES, SET],
                         ids=["bash", "escapes", "cmd", "powershell", "one line", "variables", "set"])
def test_every_way_of_quoting_is_the_same_command(source: str) -> None:
    command = read_command(source, HERE)
    assert command.script == "train_network.py"
    own = {key: value for key, value in command.arguments.items() if not key.startswith("accelerate.")}
    assert own == WANTED


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_windows_files(end: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.bat").write_bytes(CMD.replace("\n", end).encode(encoding))
    from impasto.training.foreign import import_recipe

    assert import_recipe([tmp_path / "a.bat"]).tree["base"]["path"] == "my models/v1 5.safetensors"


def test_backslashes_are_parts_of_windows_paths(tmp_path: Path) -> None:
    source = ('accelerate launch train_network.py --pretrained_model_name_or_path=C:\\models\\new.safetensors '
              '--train_data_dir="D:\\my pictures\\" --output_dir=C:\\out\\\n')
    command = read_command(source, HERE)
    assert command.arguments == {"pretrained_model_name_or_path": "C:\\models\\new.safetensors",
                                 "train_data_dir": "D:\\my pictures\\", "output_dir": "C:\\out\\"}
    found = imported(tmp_path, source)
    assert became(found)["base.path"] == "C:\\models\\new.safetensors"


def test_the_launchers_options_are_not_the_scripts(tmp_path: Path) -> None:
    found = imported(tmp_path, "accelerate launch --mixed_precision=fp16 --num_processes=2 --num_machines 1 "
                               "train_network.py --pretrained_model_name_or_path=a.ckpt --mixed_precision=bf16")
    assert became(found)["train.precision"] == "bf16"
    assert fate(found, "accelerate.mixed_precision") == "needless"
    assert fate(found, "accelerate.num_processes") == "lost"
    assert fate(found, "accelerate.num_machines") == "without effect"


def test_arguments_alone_will_do(tmp_path: Path) -> None:
    found = imported(tmp_path, "--pretrained_model_name_or_path=a.ckpt \\\n --network_dim 8")
    assert became(found)["method.rank"] == 8 and any("no script is named" in note for note in found.notes)


def test_a_variable_that_the_file_does_not_set_is_told_of(tmp_path: Path) -> None:
    found = imported(tmp_path, "python train_network.py --pretrained_model_name_or_path=$BASE --seed=%SEED%")
    assert became(found)["base.path"] == "base.safetensors" and "base.path" in found.to_fill_in
    assert "variable of the shell" in reason(found, "variables.pretrained_model_name_or_path")
    assert fate(found, "variables.seed") == "lost"


def test_nothing_is_run(tmp_path: Path) -> None:
    there = tmp_path / "made"
    found = imported(tmp_path, f'python train_network.py --pretrained_model_name_or_path="`touch {there}`" '
                               f'--output_name="$(touch {there})"')
    assert not there.exists() and became(found)["base.path"] == f"`touch {there}`"


def test_arguments() -> None:
    assert arguments(["--a=1", "--b", "2", "--c", "--d", "1", "2", "3", "--e=", "-f", "x=y"]) == {
        "a": "1", "b": "2", "c": True, "d": ["1", "2", "3"], "e": "", "f": "x=y"}
    assert arguments(["--min", "-1", "--max=-2"]) == {"min": "-1", "max": "-2"}


@pytest.mark.parametrize(("source", "told"), [
    ("accelerate launch train_network.py --output_name 'dog", "a quote is not closed"),
    ("accelerate launch flux_train_network.py --seed 1", "trains FLUX"),
    ("python train_textual_inversion.py --token_string=x", "trains textual inversion"),
    ("accelerate launch my_train.py --config_file=x.toml", "names no script of kohya's"),
])
def test_bad_commands_are_one_line(source: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told) as raised:
        imported(tmp_path, source)
    assert "\n" not in str(raised.value) and "settings.txt" in str(raised.value)
