import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flexnorm.lab.models import norm_names
from flexnorm.lab.run import OPTIMS, SCHEDULES, Config, load_config, load_variants

configs = st.fixed_dictionaries(
    {},
    optional={
        "limit": st.none() | st.integers(1, 100),
        "model": st.sampled_from(["convnet", "resnet8"]),
        "model_args": st.dictionaries(st.sampled_from(["width"]), st.integers(1, 9)),
        "norms": st.lists(st.sampled_from(norm_names()), min_size=1, unique=True),
        "norm_args": st.dictionaries(
            st.sampled_from(norm_names()), st.dictionaries(st.just("momentum"), st.floats(0, 1))
        ),
        "optims": st.dictionaries(
            st.sampled_from(list(OPTIMS)), st.dictionaries(st.just("lr"), st.floats(1e-3, 1)), min_size=1
        ),
        "overrides": st.dictionaries(st.sampled_from(["none", "none/sgd"]), st.just({"lr": 0.001})),
        "epochs": st.integers(1, 99),
        "seeds": st.integers(1, 5) | st.lists(st.integers(0, 99), min_size=1, unique=True),
        "lr": st.none() | st.floats(1e-6, 10),
        "label_smoothing": st.floats(0, 0.9),
        "augment": st.lists(st.sampled_from(["flip", "shift", "crop"]), unique=True),
        "schedule": st.sampled_from(list(SCHEDULES)),
        "deterministic": st.booleans(),
        "gamma_decay": st.just({}) | st.fixed_dictionaries({"coefficient": st.just("adaptive") | st.floats(0, 1)}),
        "coherence": st.floats(0, 1),
        "estimate": st.dictionaries(st.sampled_from(["every", "samples"]), st.integers(1, 99)),
    },
)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(configs)
def test_yaml_and_json_round_trips_give_the_same_experiment(values):
    config = Config.from_dict(values)
    through_yaml = Config.from_dict(yaml.safe_load(yaml.safe_dump(config.as_dict())))
    through_json = Config.from_dict(json.loads(json.dumps(config.as_dict())))
    assert through_yaml == through_json == config
    assert through_yaml.fingerprint("x") == config.fingerprint("x")


@settings(deadline=None, max_examples=40, derandomize=True)
@given(configs, st.data())
def test_a_single_run_keeps_its_settings(values, data):
    config = Config.from_dict(values)
    norm = data.draw(st.sampled_from(config.norms))
    optim = data.draw(st.sampled_from(list(config.optims)))
    single = config.single(norm, optim, config.seeds[-1])
    assert single.optim_settings(norm, optim) == config.optim_settings(norm, optim)
    assert single.seeds == config.seeds[-1:]
    assert single.single(norm, optim, single.seeds[0]) == single


def test_settings_are_layered_from_general_to_special():
    config = Config.from_dict(
        {
            "optims": {"sgd": {"momentum": 0.5}, "sgdg": None},
            "lr": 0.7,
            "overrides": {"none": {"lr": 0.3, "weight_decay": 0.0}, "none/sgd": {"lr": 0.2}},
        }
    )
    assert config.optim_settings("batch", "sgd") == {**OPTIMS["sgd"], "lr": 0.7, "momentum": 0.5}
    assert config.optim_settings("none", "sgdg") == {**OPTIMS["sgdg"], "lr": 0.3, "weight_decay": 0.0}
    assert config.optim_settings("none", "sgd")["lr"] == 0.2
    assert config.optim_settings("batch", "sgdg")["lr_manifold"] == OPTIMS["sgdg"]["lr_manifold"]


def test_the_fingerprint_sees_what_matters_and_nothing_else():
    base = Config()
    same = Config.from_dict(
        {"optims": {"sgd": dict(OPTIMS["sgd"]), "sgdg": {}, "adamg": {}}, "data": "a/copy.npz", "checkpoint_every": 5}
    )
    assert same.fingerprint("x") == base.fingerprint("x")
    assert base.fingerprint("x") != base.fingerprint("y")
    turns = [dataclasses.replace(base, overrides={"batch/sgdg": {"ortho_every": k}}).fingerprint("x") for k in (1, 4)]
    assert turns[0] == base.fingerprint("x") != turns[1]
    for change in ({"epochs": 11}, {"lr": 0.2}, {"seeds": (0,)}, {"overrides": {"none": {"lr": 0.1234}}}, {"limit": 9}):
        assert dataclasses.replace(base, **change).fingerprint("x") != base.fingerprint("x")


def test_seeds_and_names_in_short_form():
    config = Config.from_dict({"norm": "batch, group", "optim": "sgd,adamw", "seeds": 2, "augment": "flip"})
    assert config.norms == ("batch", "group")
    assert list(config.optims) == ["sgd", "adamw"]
    assert config.seeds == (0, 1)
    assert config.augment == ("flip",)
    assert Config.from_dict({"norms": [None, "batch"]}).norms == ("none", "batch")


BAD = [
    ({"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'"),
    ({"norm": "batch", "norms": "group"}, "norms is given twice"),
    ({"norms": "bacth"}, "unknown norm 'bacth'; did you mean 'batch'"),
    ({"norms": "batch,batch"}, "lists a name twice"),
    ({"norms": []}, "norms is empty"),
    ({"norms": {"batch": 1}}, "norms must be a list of names"),
    ({"norms": [1]}, "norms must be a list of names"),
    ({"optims": "sgf"}, "unknown optim 'sgf'; did you mean 'sgdg'|did you mean 'sgd'"),
    ({"optims": {"sgd": {"learning_rate": 1}}}, "optims: sgd: unknown setting 'learning_rate'"),
    ({"optims": {"sgd": {"lr": 0}}}, "optims: sgd: lr must be a number above 0"),
    ({"optims": {"sgd": {"momentum": -1}}}, "momentum must be a number of at least 0"),
    ({"optims": {"sgd": {"nesterov": 1}}}, "nesterov must be true or false"),
    ({"optims": {"sgd": 3}}, "optims: sgd must be a mapping"),
    ({"overrides": {"nix": {}}}, "overrides: 'nix' is neither NORM nor NORM/OPTIM"),
    ({"overrides": {"none/sgd": {"lr_manifold": 1}}}, "overrides: none/sgd: unknown setting 'lr_manifold'"),
    ({"norm_args": {"grop": {}}}, "norm_args: unknown norm 'grop'"),
    ({"norm_args": 3}, "norm_args must be a mapping"),
    (
        {"model": "resnet19"},
        "unknown model 'resnet19'; did you mean 'resnet",
    ),
    ({"baseline": "btach"}, "unknown baseline 'btach'"),
    ({"augment": "flop"}, "unknown augment 'flop'; did you mean 'flip'"),
    ({"precision": "bf16"}, "unknown precision 'bf16'"),
    ({"epochs": 0}, "epochs must be at least 1"),
    ({"epochs": "ten"}, "epochs must be a whole number, not 'ten'"),
    ({"epochs": True}, "epochs must be a whole number"),
    ({"epochs": 1.5}, "epochs must be a whole number"),
    ({"data": 5}, "data must be text"),
    ({"deterministic": "yes"}, "deterministic must be true or false"),
    ({"lr": "big"}, "lr must be a number"),
    ({"lr": 0}, "lr must be a positive number"),
    ({"lr": float("inf")}, "lr must be a positive number"),
    ({"label_smoothing": 1}, "label_smoothing must be at least 0 and below 1"),
    ({"seeds": 0}, "seeds must be a count of at least 1"),
    ({"seeds": [1, 1]}, "seeds must be different numbers"),
    ({"seeds": "three"}, "seeds must be a count"),
    ({"seeds": [-1]}, "seeds must be different numbers >= 0"),
    ({"limit": 0}, "limit must be at least 1"),
    ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
    (
        {"schedule": "step", "schedule_args": {"drop": [3]}},
        "schedule step: unknown argument 'drop'; did you mean 'drops'",
    ),
    ({"schedule": "step", "schedule_args": {"drops": "3"}}, "drops must be a list of epochs"),
    ({"schedule": "cosine", "schedule_args": {"final": -1}}, "final must be a number >= 0"),
    ({"gamma_decay": {"coeficient": 1}}, "gamma_decay: unknown setting 'coeficient'; did you mean 'coefficient'"),
    ({"gamma_decay": {"coefficient": "adaptiv"}}, "coefficient must be adaptive or a number of at least 0"),
    ({"gamma_decay": {"coefficient": -1}}, "coefficient must be adaptive or a number of at least 0"),
    ({"gamma_decay": {"decoupled": 1}}, "gamma_decay: decoupled must be true or false"),
    ({"gamma_decay": {"batch_size": 1}}, "gamma_decay: batch_size must be a whole number of at least 2"),
    ({"gamma_decay": {"every": None}}, "gamma_decay: every must be a whole number of at least 1"),
    ({"coherence": -0.1}, "coherence must be a number of at least 0"),
    ({"estimate": {"pool": 3}}, "estimate: unknown setting 'pool'"),
    ({"estimate": {"samples": 0}}, "estimate: samples must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(v) for v, _ in BAD])
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(values)


def test_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("epochs: 3\nnorm: batch\n")
    assert load_config(path) == {"epochs": 3, "norm": "batch"}
    with pytest.raises(ValueError, match="has no scales"):
        load_config(path, "small")
    path.write_text("title: x\nconfig: {epochs: 9, limit: 5}\nscales: {small: {epochs: 1}, full: }\n")
    assert load_config(path) == {"epochs": 9, "limit": 5}
    assert load_config(path, "small") == {"epochs": 1, "limit": 5}
    assert load_config(path, "full") == {"epochs": 9, "limit": 5}
    with pytest.raises(ValueError, match="unknown scale 'smal'; did you mean 'small'"):
        load_config(path, "smal")
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold settings like"):
        load_config(path)
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match="no config file"):
        load_config(tmp_path / "none.yaml")


def test_variants_replace_settings_of_the_scale_and_reach_inside(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "config: {epochs: 9, optims: [sgd, sgdg]}\n"
        "variants: {'b=1': {batch_size: 1}, low: {optims.sgd.lr: 0.1}, same: }\n"
        "scales: {small: {epochs: 1}, tiny: {variants: {only: {epochs: 2}}}}\n"
    )
    found = load_variants(path, "small")
    assert list(found) == ["b=1", "low", "same"]
    assert found["b=1"] == {"epochs": 1, "optims": ["sgd", "sgdg"], "batch_size": 1}
    assert found["low"] == {"epochs": 1, "optims": {"sgd": {"lr": 0.1}, "sgdg": {}}}
    assert found["same"] == {"epochs": 1, "optims": ["sgd", "sgdg"]}
    assert load_variants(path, "tiny") == {"only": {"epochs": 2, "optims": ["sgd", "sgdg"]}}
    with pytest.raises(ValueError, match=r"holds 3 experiments \(b=1, low, same\)"):
        load_config(path)
    path.write_text("config: {epochs: 9}\n")
    assert load_variants(path) == {"": {"epochs": 9}}
    path.write_text("config: {epochs: 9}\nvariants: [1]\n")
    with pytest.raises(ValueError, match="variants must be a mapping"):
        load_variants(path)
    path.write_text("config: {epochs: 9}\nvariants: {../up: {}}\n")
    with pytest.raises(ValueError, match="is no name for a variant"):
        load_variants(path)


def test_default_learning_rates_shrink_with_small_batches_and_given_ones_do_not():
    small = Config(batch_size=16, optims={name: {} for name in OPTIMS})
    assert small.optim_settings("batch", "sgd")["lr"] == pytest.approx(OPTIMS["sgd"]["lr"] / 4)
    assert small.optim_settings("batch", "sgdg")["lr_manifold"] == pytest.approx(OPTIMS["sgdg"]["lr_manifold"] / 4)
    assert small.optim_settings("batch", "adamg")["lr_manifold"] == pytest.approx(OPTIMS["adamg"]["lr_manifold"] / 2)
    assert small.optim_settings("batch", "adamg")["lr"] == pytest.approx(OPTIMS["adamg"]["lr"] / 2)
    with_sgd = dataclasses.replace(small, optims={"adamg": {"off_manifold": "sgd"}})
    assert with_sgd.optim_settings("batch", "adamg")["lr"] == pytest.approx(OPTIMS["sgd"]["lr"] / 4)
    assert small.optim_settings("batch", "adamw")["lr"] == pytest.approx(OPTIMS["adamw"]["lr"] / 2)
    assert small.optim_settings("batch", "adamp")["lr"] == pytest.approx(OPTIMS["adamp"]["lr"] / 2)
    assert Config(batch_size=512).optim_settings("batch", "sgd") == OPTIMS["sgd"]
    assert dataclasses.replace(small, lr=0.3).optim_settings("batch", "sgd")["lr"] == 0.3
    assert dataclasses.replace(small, optims={"sgd": {"lr": 0.1}}).optim_settings("batch", "sgd")["lr"] == 0.1


def test_adam_g_has_the_settings_of_what_moves_the_rest():
    def settings(**given):
        return Config(optims={"adamg": given}).optim_settings("batch", "adamg")

    adamw, sgd = settings(), settings(off_manifold="sgd")
    assert (adamw["off_manifold"], adamw["lr"], adamw["weight_decay"]) == ("adamw", 3e-3, 0.05)
    assert (sgd["lr"], sgd["weight_decay"], sgd["nesterov"]) == (0.1, 5e-4, True)
    assert settings(nesterov=False)["off_manifold"] == "sgd"  # as configurations from before the choice name it
    cell = Config(overrides={"none/adamg": {"off_manifold": "sgd", "nesterov": False}})
    assert cell.optim_settings("none", "adamg")["lr"] == 0.1
    assert cell.optim_settings("batch", "adamg") == adamw
    with pytest.raises(ValueError, match="unknown setting 'nesterov'"):
        settings(off_manifold="adamw", nesterov=True)
    with pytest.raises(ValueError, match="optims: adamg: off_manifold must be adamw or sgd, not 'adam'"):
        settings(off_manifold="adam")
    with pytest.raises(ValueError, match="unknown setting 'off_manifold'"):
        Config(optims={"sgdg": {"off_manifold": "sgd"}})
