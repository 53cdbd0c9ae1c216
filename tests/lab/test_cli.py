import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from flexnorm import __version__
from flexnorm.lab import cli
from flexnorm.lab.commands import recipe as recipe_command

FAST = ["--norm", "batch,none", "--optim", "sgd", "--limit", "100", "--epochs", "1", "--seeds", "1"]
TINY = ["--set", "model_args.widths=[4,8]", "--set", "probe=16", "--set", "shift_samples=16"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command line in a folder of its own; the result carries .out, .err and .code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLEXNORM_TRACEBACK", raising=False)

    def call(*args, code=0):
        result = CliRunner().invoke(cli.app, [str(a) for a in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        if code:
            assert "Traceback" not in result.output
        return result

    return call


def test_help_and_version(run):
    assert run("--version").stdout == f"flexnorm {__version__}\n"
    text = run("--help").stdout
    for command in ("compare", "train", "report", "data", "recipe"):
        assert command in text
    text = re.sub(r"\s+", " ", run("compare", "--help").stdout)
    for option in ("--data", "--norm", "--optim", "--epochs", "--seeds", "--batch-size", "--lr", "--out", "--config"):
        assert option in text
    assert "Examples" in text
    assert "Examples" not in run("train", "--help").stdout
    run("nonsense", code=2)


def test_help_keeps_the_extra_that_plots_need(run):
    assert "flexnorm[plot]" in run("theory", "dynamics", "--help").output


def test_help_needs_no_heavy_import():
    """Only what `import flexnorm` itself needs may load before a command runs."""
    code = (
        "import sys, flexnorm; before = set(sys.modules); import flexnorm.lab.cli; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'sklearn', 'scipy', 'ot', 'lightning_fabric', 'yaml', 'datasets', 'vl_convert'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_the_lab_one_line_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['typer'] = None; import flexnorm.__main__; flexnorm.__main__.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "the flexnorm command needs typer: pip install 'flexnorm[lab]'\n"
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"flexnorm": "flexnorm.__main__:main"}


def test_options_are_the_same_wherever_they_are_taken(run):
    compare, train = (run(command, "--help").stdout for command in ("compare", "train"))
    options = [set(re.findall(r"--[a-z-]+", text)) for text in (compare, train)]
    assert (options[0] - options[1], options[1] - options[0]) == ({"--seeds"}, {"--seed"})


def test_compare_end_to_end(run, tmp_path):
    out = run("compare", *FAST, *TINY).stdout
    assert "digits: 100 train + 100 test images" in out
    assert "1/2  batch" in out
    assert "vs batch" in out
    assert "report: runs/digits/report.html" in out
    folder = tmp_path / "runs" / "digits"
    assert (folder / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["norms"] == ["batch", "none"]
    assert results["command"].split()[0] == "flexnorm"
    assert len(results["table"]) == 2

    assert run("compare", *FAST, *TINY).stdout.count("(was complete)") == 2
    error = run("compare", *FAST, *TINY, "--epochs", "2", code=2).stderr
    assert "runs/digits holds another experiment" in error
    assert "epochs: 1 there, 2 here" in error

    (folder / "report.html").unlink()
    assert "report.html" in run("report", folder).stdout
    assert (folder / "report.html").exists()


def test_a_config_file_and_options_that_win_over_it(run, tmp_path):
    config = {
        "norms": ["batch", "group"],
        "optims": {"sgd": {"lr": 0.05}, "adamw": {"lr": 0.002}},
        "limit": 100,
        "epochs": 1,
        "seeds": [3],
        "model_args": {"widths": [4, 8]},
        "shift_every": 0,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    run("compare", "--config", "mine.yaml", "--optim", "adamw", "--norm", "group", "--set", "optims.adamw.beta1=0.5")
    stored = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())["config"]
    assert stored["norms"] == ["group"]
    assert stored["optims"] == {"adamw": {"lr": 0.002, "beta1": 0.5}}
    assert stored["seeds"] == [3]
    # The config.yaml of a run is a config file itself.
    run("compare", "--config", tmp_path / "runs/mine/runs/group/adamw/seed3/config.yaml", "--out", "again")
    runs = [json.loads((tmp_path / f / "results.json").read_text())["runs"][0] for f in ("runs/mine", "again")]
    assert runs[0]["result"] == runs[1]["result"]


def test_set_reaches_the_default_optimizers(run, tmp_path):
    run("compare", *FAST, *TINY, "--set", "optims.sgd.momentum=0.5", "--out", "a")
    assert json.loads((tmp_path / "a" / "results.json").read_text())["config"]["optims"] == {"sgd": {"momentum": 0.5}}


def test_train_shows_every_epoch(run, tmp_path):
    out = run("train", "--norm", "unitized", "--limit", "100", "--epochs", "2", "--seed", "5", *TINY).stdout
    assert "epoch   1/2" in out
    assert "epoch   2/2" in out
    folder = tmp_path / "runs/digits-unitized-sgd-seed5/runs/unitized/sgd/seed5"
    again = run("train", "--config", folder / "config.yaml", "--out", "again").stdout
    assert [line.split("  ")[1:4] for line in out.splitlines() if line.startswith("epoch")] == [
        line.split("  ")[1:4] for line in again.splitlines() if line.startswith("epoch")
    ]
    (tmp_path / "many.yaml").write_text("norms: [batch, group]")
    assert "train takes one of batch, group: choose with --norm" in run("train", "--config", "many.yaml", code=2).stderr


def test_data(run, tmp_path):
    out = run("data", "digits", "--limit", "50").stdout
    assert "digits: 50 train + 50 test images, 1 channel, 8x8, 10 classes" in out
    assert re.search(r"7 +5 train +5 test", out)
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 2)))
    assert "a.npz lacks y_train, x_test, y_test" in run("data", "a.npz", code=2).stderr


def test_recipes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_command, "__file__", str(tmp_path / "flexnorm" / "lab" / "commands" / "recipe.py"))
    assert "there are no recipes here" in run("recipe", "list", code=2).stderr
    (tmp_path / "recipes").mkdir()
    recipe = {
        "title": "Table 1 in small",
        "paper": "none",
        "published": {"batch": 0.5},
        "config": {"norms": "batch", "optims": "sgd", "epochs": 30, "seeds": 1, "model_args": {"widths": [4, 8]}},
        "scales": {"small": {"epochs": 1, "limit": 100}, "full": None},
    }
    (tmp_path / "recipes" / "table1.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "recipes" / "bare.yaml").write_text("[]")
    out = run("recipe", "list").stdout
    assert re.search(r"table1 +Table 1 in small  \[full, small\]", out)
    assert "published:" in run("recipe", "show", "table1").stdout
    assert "unknown recipe 'tabel1'; did you mean 'table1'" in run("recipe", "show", "tabel1", code=2).stderr
    assert "report: runs/table1-small/report.html" in run("recipe", "run", "table1", "--scale", "small").stdout
    assert "unknown scale 'smal'" in run("recipe", "run", "table1", "--scale", "smal", code=2).stderr


def test_every_recipe_of_the_house_is_a_valid_experiment_at_every_scale():
    from flexnorm.lab.run import Config, load_variants

    files = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        recipe = yaml.safe_load(file.read_text())
        assert {"title", "paper", "figure", "published", "config"} <= recipe.keys(), file
        for scale in (None, *recipe.get("scales", {})):
            for values in load_variants(file, scale).values():
                Config.from_dict(values)


def test_variants_of_a_recipe_are_experiments_in_folders_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_command, "__file__", str(tmp_path / "flexnorm" / "lab" / "commands" / "recipe.py"))
    (tmp_path / "recipes").mkdir()
    recipe = {
        "title": "Batch sizes",
        "config": {
            "norms": "batch",
            "optims": "sgd",
            "epochs": 1,
            "seeds": 1,
            "limit": 80,
            "model_args": {"widths": [4]},
        },
        "variants": {"lr=0.2": {"optims.sgd.lr": 0.2}, "batch-16": {"batch_size": 16}},
    }
    (tmp_path / "recipes" / "sizes.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    out = run("recipe", "run", "sizes", "--set", "shift_every=0").stdout
    assert "sizes, variant 1 of 2: lr=0.2" in out
    assert "report: runs/sizes/batch-16/report.html" in out
    found = {
        name: yaml.safe_load((tmp_path / "runs/sizes" / name / "runs/batch/sgd/seed0/config.yaml").read_text())
        for name in recipe["variants"]
    }
    assert [(c["batch_size"], c["optims"]["sgd"]["lr"]) for c in found.values()] == [(64, 0.2), (16, 0.025)]
    again = run("recipe", "run", "sizes", "--set", "shift_every=0", "--variant", "batch-16").stdout
    assert "variant 1 of 1: batch-16" in again
    assert "(was complete)" in again
    assert "unknown variant 'batch-61'" in run("recipe", "run", "sizes", "--variant", "batch-61", code=2).stderr
    assert "2 experiments (lr=0.2, batch-16)" in run("compare", "--config", "recipes/sizes.yaml", code=2).stderr
    recipe["variants"]["batch-16"] = {"batch_size": 0}
    (tmp_path / "recipes" / "sizes.yaml").write_text(yaml.safe_dump(recipe))
    assert "variant batch-16: batch_size must be at least 1" in run("recipe", "run", "sizes", code=2).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--norm", "bacth"], "unknown norm 'bacth'; did you mean 'batch'? Valid: batch, "),
        (["--optim", "sgdd"], "unknown optim 'sgdd'; did you mean"),
        (["--model", "timm:resnet18"], "Models of timm and of modules are for `flexnorm profile`"),
        (["--model", "convnett"], "unknown model 'convnett'; did you mean 'convnet'"),
        (["--data", "digit"], "unknown data set 'digit'; did you mean 'digits'"),
        (["--data", "missing.npz"], "no data at missing.npz"),
        (["--seeds", "two"], "--seeds must be a count (3) or a list (0,5,7), not 'two'"),
        (["--seeds", "1,1"], "seeds must be different numbers"),
        (["--set", "epochs"], "--set takes KEY=VALUE"),
        (["--set", "epoch=3"], "unknown key 'epoch'; did you mean 'epochs'"),
        (["--lr", "0"], "lr must be a positive number"),
        (["--scale", "small"], "--scale needs --config"),
        (["--config", "none.yaml"], "no config file none.yaml"),
        (["--device", "cuda:77"], "device 'cuda:77'"),
        (["--set", "model_args.depth=3", "--norm", "batch"], "model convnet with norm batch"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(run, tmp_path, args, message):
    result = run("compare", "--epochs", "1", "--limit", "50", *args, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") <= 2
    assert not (tmp_path / "runs" / "digits" / "runs" / "none").exists()


def test_batch_size_one_trains_normprop_and_explains_batch(run):
    args = ["--norm", "normprop,batch", "--batch-size", "1", "--limit", "30", "--seeds", "1", "--epochs", "1"]
    out = " ".join(run("compare", *args, "--optim", "sgd", "--lr", "0.001", *TINY).stdout.split())
    assert re.search(r"normprop sgd seed 0 test accuracy [\d.]+ %", out)
    assert "batch sgd seed 0 refused: batch normalizes by the statistics of the training batch" in out
    assert re.search(r"with a norm that can: .*normprop", out)


def test_seed_lists(run, tmp_path):
    run("compare", *FAST, *TINY, "--seeds", "4,2", "--norm", "batch", "--out", "a")
    assert sorted(p.name for p in (tmp_path / "a/runs/batch/sgd").iterdir()) == ["seed2", "seed4"]


def test_tracebacks_on_request(run, monkeypatch):
    monkeypatch.setenv("FLEXNORM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown data set"):
        run("data", "digit")


def test_errors_that_are_bugs_are_not_hidden(run, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("flexnorm.lab.data.load", broken)
    with pytest.raises(ZeroDivisionError):
        run("data", "digits")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped.\n"),
        (PermissionError(13, "Permission denied", "out/x"), 1, "error: out/x: Permission denied"),
        (OSError(28, "cannot write out/y: No space left on device"), 1, "error: cannot write out/y: No space left"),
        (ImportError("needs the datasets package"), 2, "error: needs the datasets package"),
    ],
)
def test_exit_codes(run, monkeypatch, error, code, message):
    def failing(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("flexnorm.lab.data.load", failing)
    assert message in run("data", "digits", code=code).stderr


@pytest.mark.parametrize(
    ("command", "work", "resumes"),
    [
        (["compare"], "flexnorm.lab.run.load_config", True),
        (["train"], "flexnorm.lab.run.load_config", True),
        (["recipe", "run", "demo"], "flexnorm.lab.run.load_variants", True),
        (["profile"], "flexnorm.lab.profile.profile", False),
        (["theory", "regularization"], "flexnorm.lab.figures.regularization_figure", False),
    ],
)
def test_only_a_command_that_resumes_says_so_when_it_is_stopped(run, monkeypatch, command, work, resumes):
    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, stopped)
    more = ["--config", "c.yaml"] if work.endswith("load_config") else []
    err = run(*command, *more, code=130).stderr
    assert err == f"stopped.{' The same command resumes where this one ended.' * resumes}\n"


LONG = [*FAST, *TINY, "--epochs", "100000", "--set", "shift_every=0"]


def start(*args, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", "from flexnorm.lab.cli import main; main()", *args]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_with_exit_code_130(tmp_path):
    process = start("compare", *LONG, "--out", "out", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/runs/batch/sgd/seed0/checkpoint.pt").exists():
        assert time.monotonic() < deadline, "no progress"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "stopped. What was complete is kept; the same command resumes where this one ended.\n"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_full_disk_ends_with_one_message_and_can_be_resumed(run, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # the checkpoint of this network is larger

    process = start("compare", *FAST, *TINY, "--out", "out", cwd=tmp_path, preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.match(r"error: cannot write out/runs/batch/sgd/seed0/checkpoint\.pt: File too large\.", err)
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.tmp"))
    run("compare", *FAST, *TINY, "--out", "out")
    assert len(list(Path("out").glob("runs/*/*/*/summary.json"))) == 2


def test_a_config_may_name_its_folder(run, tmp_path):
    (tmp_path / "c.yaml").write_text("out: here\nnorms: [none]\noptims: [sgd]\nseeds: 1\nepochs: 1\nlimit: 100\n")
    run("compare", "--config", "c.yaml", "--set", "model_args.widths=[4]")
    assert (tmp_path / "here" / "results.json").exists()


def test_nothing_completed_is_a_failure(run):
    result = run("compare", *FAST, *TINY, "--norm", "batch", "--batch-size", "1", code=1)
    assert "no run was completed" in result.output


def test_a_recipe_says_at_which_scale_it_runs(run):
    result = run("recipe", "run", "unitization_cifar10", "--data", "missing.npz", code=2)
    assert "running at the scale of the paper; --scale takes full, small" in result.output
