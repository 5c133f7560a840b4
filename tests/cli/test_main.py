"""The program as a whole: exit codes, mistyped verbs, and the real process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import moeforge
from moeforge.cli.main import VERBS

COMMAND = [sys.executable, "-m", "moeforge"]


def test_help_names_every_verb(call):
    code, out, _ = call("--help")
    assert code == 0
    assert [verb for verb in VERBS if verb not in out] == []


def test_a_mistyped_verb_gets_the_nearest(call):
    code, _, err = call("trian", "dense")
    assert code == 2
    assert "Did you mean 'train'?" in err


def test_a_missing_argument_and_an_unknown_option_exit_with_2(call):
    assert call("train").code == 2
    code, _, err = call("generate", "model", "--tempreature", "1")
    assert code == 2
    assert "--temperature" in err


def test_version(call):
    assert call("--version") == (0, f"{moeforge.__version__}\n", "")


def test_the_real_program_prints_one_line_for_bad_input():
    done = subprocess.run([*COMMAND, "train", "mixtrl"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no recipe 'mixtrl'. Did you mean 'mixtral'?")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(tiny: Path, tmp_path: Path):
    out = tmp_path / "run"
    command = [
        *COMMAND,
        "train",
        str(tiny),
        "--steps=99999",
        "--eval_every=99999",
        "--save_every=99999",
        f"--out={out}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"moeforge train {out / 'config.yaml'} --out {out} --resume" in err
    assert "Traceback" not in err
    assert len(list((out / "checkpoints").glob("step-*"))) == 1
