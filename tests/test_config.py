"""The config: what is accepted, what is refused, and that each fault names its key and place."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from generation.run import CONFIG_CHECKS
from utils.cli import new_parser, parse_args, parse_int_list
from utils.config import (
    ALIASES,
    RULES,
    Config,
    RawConfig,
    format_config,
    keys_by_resume,
    load_config,
    parse_value,
    validate,
    warnings_of,
)
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent

# Configs of the projects that users come from have these keys, and they keep working.
KNOWN_KEYS: dict[str, Any] = {
    "project_name": "p",
    "experiment_name": "e",
    "resume_path": None,
    "seed": 1,
    "gpu_ids": [0],
    "port": 12355,
    "model_type": "unet",
    "model_params": {"model_channels": 32},
    "dataset": "custom",
    "data_root": "somewhere",
    "image_size": 32,
    "conditional": True,
    "num_classes": 3,
    "use_subdirs": False,
    "label_file": "labels.json",
    "num_workers": 2,
    "num_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "cosine",
    "loss_type": "huber",
    "cfg_dropout_prob": 0.1,
    "cfg_scale": 1.3,
    "num_inference_steps": 50,
    "ddim_eta": 0.0,
    "epochs": 200,
    "batch_size": 64,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "ema_decay": 0.9999,
    "use_scheduler": True,
    "scheduler_type": "step",
    "warmup_epochs": 5,
    "warmup_start_factor": 0.01,
    "step_size": 30,
    "gamma": 0.1,
    "save_dir": "checkpoints",
    "save_interval": 10,
    "sample_dir": "samples",
    "sample_interval": 10,
    "sample_start_epoch": 1,
    "num_samples": 16,
    "use_swanlab": False,
}


def write(folder: Path, text: str, name: str = "run.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load_python(folder: Path, body: str = "", *overrides: str, name: str = "run.py") -> Config:
    path = write(folder, f"config = dict({body})", name)
    return load_config(path, overrides, checks=CONFIG_CHECKS)


def load_yaml(folder: Path, text: str, *overrides: str) -> Config:
    return load_config(write(folder, text, "run.yml"), overrides, checks=CONFIG_CHECKS)


def fault_of(folder: Path, body: str = "", *overrides: str, name: str = "run.py") -> str:
    with pytest.raises(ConfigError) as caught:
        load_python(folder, body, *overrides, name=name)
    return str(caught.value)


# --- values


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    config = load_yaml(tmp_path, "learning_rate: 2e-4\nepochs: 1e3\nbatch_size: 64.0\nseed: '7'\n")
    assert (config.learning_rate, config.epochs, config.batch_size, config.seed) == (
        2e-4,
        1000,
        64,
        7,
    )
    assert all(type(n) is int for n in (config.epochs, config.batch_size, config.seed))


def test_yaml_on_is_true_and_only_for_flags(tmp_path):
    assert load_yaml(tmp_path, "use_scheduler: on\nuse_ema: off\n").use_scheduler is True
    with pytest.raises(ConfigError, match="batch_size=True: a number is needed, not true or false"):
        load_yaml(tmp_path, "batch_size: on\n")


NUMBERS = [
    name
    for name, value in KNOWN_KEYS.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
]


@pytest.mark.parametrize("key", [*NUMBERS, "max_steps", "grad_clip", "image_channels", "keep_last"])
def test_no_number_is_a_bool_or_infinite(key):
    for value in (True, math.nan, math.inf, -1, "abc", []):
        with pytest.raises(ConfigError) as caught:
            validate(RawConfig({key: value, "experiment_name": "run"}, {key: "here"}))
        assert str(caught.value).startswith(f"here: {key}=")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [key for key, field in Config.model_fields.items() if field.annotation in (bool, bool | None)],
)
def test_a_flag_is_true_or_false_and_nothing_like_it(key):
    for value in (1, 0, "yes", "no", "true", 1.0):
        with pytest.raises(ConfigError, match=f"here: {key}={value!r}: only True or False"):
            validate(RawConfig({key: value, "experiment_name": "run"}, {key: "here"}))


def test_compile_is_a_mode_and_true_means_the_whole_model(tmp_path):
    modes = [load_python(tmp_path, f"compile={v}").compile for v in ("True", "False", "'blocks'")]
    assert modes == ["model", None, "blocks"]


def test_sizes_and_sequences(tmp_path):
    params = "model_params=dict(channel_mult=(1, 2))"
    assert load_python(tmp_path, f"image_size=32, {params}").image_size == (32, 32)
    assert load_python(tmp_path, f"image_size=[16, 32], {params}").image_size == (16, 32)
    assert load_python(tmp_path, f"image_size=32.0, {params}").image_size == (32, 32)
    assert load_python(tmp_path, "gpu_ids=3").gpu_ids == (3,)
    assert load_python(tmp_path, "eval_metrics='fid'").eval_metrics == ("fid",)
    assert load_python(tmp_path, "image_channels=3.0").image_channels == 3


def test_defaults_are_valid_and_the_default_data_set_fits(tmp_path):
    config = load_python(tmp_path)
    assert config.experiment_name == "run"
    assert config.run_dir == Path("checkpoints/run")
    assert config.preview_dir == Path("checkpoints/run/samples")
    assert load_python(tmp_path, "sample_dir='there'").preview_dir == Path("there/run")


def test_defaults_that_depend_on_other_keys():
    assert (Config().guidance_scale, Config().label_dropout) == (1.0, 0.0)
    conditional = Config(conditional=True)
    assert (conditional.guidance_scale, conditional.label_dropout) == (2.0, 0.1)
    assert Config(conditional=True, cfg_dropout_prob=0).guidance_scale == 1.0


def test_all_known_keys_work_in_both_formats(tmp_path):
    config = load_config(write(tmp_path, f"config = {KNOWN_KEYS!r}"), checks=CONFIG_CHECKS)
    import yaml

    for name in ("run.yml", "run.yaml"):
        path = write(tmp_path, yaml.safe_dump(KNOWN_KEYS), name)
        assert load_config(path, checks=CONFIG_CHECKS) == config
    assert config.image_size == (32, 32)
    for key, value in KNOWN_KEYS.items():
        if key not in ("image_size", "gpu_ids"):
            assert getattr(config, key) == value


@pytest.mark.parametrize("path", sorted((ROOT / "configs").iterdir()), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    if path.suffix not in (".py", ".yml", ".yaml"):
        pytest.skip("not a config")
    config = load_config(path, checks=CONFIG_CHECKS)
    assert config.experiment_name == path.stem
    assert warnings_of(config) == []
    assert path.name in path.read_text(encoding="utf-8"), "the header shows the command"


def test_yaml_twins_equal_their_python_files():
    for path in (ROOT / "configs").glob("*.yml"):
        python = load_config(path.with_suffix(".py"))
        assert load_config(path).to_dict() == python.to_dict()


def test_frozen():
    with pytest.raises(ValidationError):
        Config().seed = 1  # type: ignore[misc]


def test_json_round_trip(tmp_path):
    body = "gpu_ids=(0, 1), image_size=(8, 16), conditional=True, cfg_interval=(0.1, 0.5)"
    config = load_python(tmp_path, f"{body}, model_params=dict(channel_mult=(1, 2))")
    stored = json.loads(format_config(config))
    assert stored == config.to_dict()
    again = validate(RawConfig(stored, {}))
    assert again.to_dict() == config.to_dict()
    assert (again.gpu_ids, again.image_size) == (config.gpu_ids, config.image_size)
    with pytest.raises(ConfigError, match=r"checkpoint\.pth: 'gone' is not a config key"):
        validate(RawConfig({**stored, "gone": 1}, {"gone": "checkpoint.pth"}))


# --- files


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    path = write(tmp_path, "config = {\n  'seed': 1,\n  'seed': 2,\n}")
    with pytest.raises(ConfigError, match=r"run\.py:\d: 'seed' is given twice"):
        load_config(path)
    path = write(tmp_path, "config = dict(\n  seed=1,\n  seed=2,\n)")
    with pytest.raises(ConfigError, match=r"run\.py:3: not valid Python: .*seed"):
        load_config(path)
    path = write(tmp_path, "seed: 1\nepochs: 2\nseed: 3\n", "run.yml")
    with pytest.raises(ConfigError, match=r"run\.yml:3: 'seed' is given twice"):
        load_config(path)
    path = write(tmp_path, "model_params:\n  dropout: 0.1\n  dropout: 0.2\n", "run.yml")
    with pytest.raises(ConfigError, match=r"run\.yml:3: 'dropout' is given twice"):
        load_config(path)
    path = write(tmp_path, "classes:\n- {a: 1,\n   a: 2}\n", "run.yml")
    with pytest.raises(ConfigError, match=r"run\.yml:3: 'a' is given twice"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("run.py", "config = dict(\n  seed=-1,\n  model_params=dict(\n    seed=1),\n)", 2),
        ("run.py", "config = dict(\n  model_params=dict(\n    seed=1),\n  seed=-1,\n)", 4),
        ("run.py", "config = {\n  'model_params': {\n    'seed': 1},\n  'seed': -1,\n}", 4),
        ("run.yml", "seed: -1\nmodel_params:\n  seed: 1\n", 1),
        ("run.yml", "model_params:\n  seed: 1\nseed: -1\n", 3),
    ],
)
def test_the_line_of_a_key_is_not_that_of_a_namesake_further_inside(tmp_path, name, text, line):
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/{name}:{line}: seed=-1: "):
        load_config(write(tmp_path, text, name))


def test_a_yaml_mapping_may_lay_its_own_keys_over_merged_ones(tmp_path):
    text = "model_params:\n  <<: {dropout: 0.1, model_channels: 32}\n  dropout: 0.2\n"
    assert load_yaml(tmp_path, text).model_params == {"dropout": 0.2, "model_channels": 32}


BAD_FILES = {
    "nothing.py": ("x = 1", "must define `config"),
    "number.py": ("config = 3", "must define `config"),
    "syntax.py": ("config = dict(\n  seed=", "syntax.py:1: not valid Python"),
    "null.py": ("config = dict()\0", "null byte"),
    "raises.py": ("import no_such_module\nconfig = {}", "running it failed: ModuleNotFoundError"),
    "keys.py": ("config = {1: 2, 'seed': 3}", "keys.py: 1 is not a config key"),
    "empty.yml": ("", "must be a mapping"),
    "list.yml": ("- seed", "must be a mapping"),
    "open.yml": ("seed: [", "not valid YAML"),
    "date.yml": ("seed: 2024-13-45", "2024-13-45 means different things"),
    "code.yml": ("seed: !!python/object/apply:os.getpid []", "not valid YAML"),
    "keys.yml": ("on: 1\n1: 2\nseed: 3\n", "True is not a config key"),
    "deep.yml": ("[" * 500, "not valid YAML"),
    "wrong.toml": ("seed = 1", "config files end in .py, .yml or .yaml"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_the_file(tmp_path, name):
    text, message = BAD_FILES[name]
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text, name))
    assert name in str(caught.value)
    assert message in str(caught.value)


def test_a_yaml_alias_of_itself_ends(tmp_path):
    with pytest.raises(ConfigError, match=r"line 1: more than 10,000 values"):
        load_yaml(tmp_path, "model_params: &loop\n  x: *loop\n")


def test_files_are_utf8(tmp_path, monkeypatch):
    assert load_python(tmp_path, "project_name='扩散'").project_name == "扩散"
    assert load_yaml(tmp_path, "project_name: 扩散\n").project_name == "扩散"
    (tmp_path / "run.py").write_bytes("config = dict(project_name='é')".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.py:1: not UTF-8 text"):
        load_config(tmp_path / "run.py")


def test_a_missing_file_suggests_a_similar_one(tmp_path):
    write(tmp_path, "config = {}", "mnist_unet.py")
    with pytest.raises(ConfigError, match=r"mnist_unt\.py: no such config file; did you mean .*t"):
        load_config(tmp_path / "mnist_unt.py")


def test_each_file_has_its_own_namespace(tmp_path):
    before = set(sys.modules)
    text = "import os\nhere = os.path.dirname(__file__)\nx = {}\nconfig = dict(data_root=here{})"
    first = load_config(write(tmp_path, text.format(1, ", seed=x"), "a.py"))
    write(tmp_path, "config = dict(seed=x)", "b.py")
    with pytest.raises(ConfigError, match="name 'x' is not defined"):
        load_config(tmp_path / "b.py")
    second = load_config(write(tmp_path, text.format(2, ""), "config.py"))
    assert (first.seed, second.seed) == (1, 42)
    assert Path(first.data_root) == tmp_path
    assert {name.split(".")[0] for name in set(sys.modules) - before}.isdisjoint(
        {"a", "config", "config_file"}
    )


def test_base_files_are_laid_under(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "seed: 1\nepochs: 7\nmodel_params: {dropout: 0.5, model_channels: 64}", "b.yml")
    write(tmp_path, "config = dict(_base_='../b.yml', seed=2)", "sub/middle.py")
    path = write(
        tmp_path / "sub", "config = dict(_base_='middle.py', model_params=dict(dropout=0.1))"
    )
    config = load_config(path)
    assert (config.seed, config.epochs, config.experiment_name) == (2, 7, "run")
    assert config.model_params == {"dropout": 0.1, "model_channels": 64}


def test_another_model_type_replaces_model_params(tmp_path):
    write(tmp_path, "config = dict(model_type='unet', model_params=dict(dropout=0.1))", "base.py")
    other = load_config(write(tmp_path, "config = dict(_base_='base.py', model_type='other')"))
    assert other.model_params == {}
    body = "config = dict(_base_='base.py', model_type='other', model_params=dict(depth=2))"
    assert load_config(write(tmp_path, body)).model_params == {"depth": 2}
    same = load_config(write(tmp_path, "config = dict(_base_='base.py', model_type='unet')"))
    assert same.model_params == {"dropout": 0.1}


def test_naming_the_default_model_type_is_no_change(tmp_path):
    write(tmp_path, "config = dict(model_params=dict(dropout=0.3))", "base.py")
    path = write(tmp_path, "config = dict(_base_='base.py', model_type='unet')")
    assert load_config(path).model_params == {"dropout": 0.3}


def test_base_cycles_and_missing_bases(tmp_path):
    write(tmp_path, "config = dict(_base_='b.py')", "a.py")
    write(tmp_path, "config = dict(_base_='a.py')", "b.py")
    with pytest.raises(ConfigError, match=r"a\.py: `_base_` refers back to itself"):
        load_config(tmp_path / "a.py")
    with pytest.raises(ConfigError, match=r"gone\.py: no such config file"):
        load_config(write(tmp_path, "config = dict(_base_='gone.py')"))
    with pytest.raises(ConfigError, match=r"run\.py:1: _base_=3: give a file name"):
        load_config(write(tmp_path, "config = dict(_base_=3)"))


# --- key=value


def test_text_fields_stay_raw(tmp_path):
    config = load_python(
        tmp_path, "", "experiment_name=123", "project_name=a=b,(1,2)", "data_root=1e3"
    )
    assert (config.experiment_name, config.project_name, config.data_root) == (
        "123",
        "a=b,(1,2)",
        "1e3",
    )


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("1,2,4", None, (1, 2, 4)),
        ("(1, 2)", None, (1, 2)),
        ("[1, 2]", None, [1, 2]),
        ("2e-4", "learning_rate", 2e-4),
        ("true", "use_ema", True),
        ("False", "use_ema", False),
        ("none", "max_steps", None),
        ("null", "grad_clip", None),
        ("None", "resume_path", None),
        ("none", None, None),
        ("none", "threshold", "none"),
        ("none", "experiment_name", "none"),
        ("fid,is", "eval_metrics", ("fid", "is")),
        ("is", "eval_metrics", "is"),
        ("concat", None, "concat"),
        ("{[]: 1}", "model_params", "{[]: 1}"),
        ("", None, ""),
    ],
)
def test_values_of_the_command_line(text, field, value):
    assert parse_value(text, field) == value
    assert type(parse_value(text, field)) is type(value)


def test_every_choice_can_be_given_on_the_command_line(tmp_path):
    for value in ("static", "dynamic", "none"):
        assert load_python(tmp_path, "", f"threshold={value}").threshold == value


def test_later_overrides_win_and_inner_keys_merge(tmp_path):
    config = load_python(
        tmp_path,
        "seed=1, model_params=dict(model_channels=32, dropout=0.5)",
        "seed=2",
        "model_params.dropout=0.1",
        "seed=3",
        "model_params.channel_mult=1,2",
    )
    assert config.seed == 3
    assert config.model_params == {"model_channels": 32, "dropout": 0.1, "channel_mult": (1, 2)}


def test_inner_keys_survive_a_model_type_given_after_them(tmp_path):
    path = write(tmp_path, "config = dict(model_params=dict(dropout=0.5))")
    config = load_config(path, ["model_params.depth=6", "model_type=other"])
    assert config.model_params == {"depth": 6}


def test_flags_and_overrides_mix():
    parser = new_parser("")
    parser.add_argument("--output_dir")
    args = parse_args(
        parser, ["seed=1", "--output-dir", "x", "a=b=c", "--set", "epochs=2", "--dry-run"]
    )
    assert (args.output_dir, args.dry_run) == ("x", True)
    assert args.overrides == ["epochs=2", "seed=1", "a=b=c"]


def test_int_lists():
    import argparse

    assert parse_int_list("0,1,5-7") == [0, 1, 5, 6, 7]
    for bad in ("", "a", "1,,2", "3-", "-1", "5-3", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole numbers"):
            parse_int_list(bad)


def test_unreadable_overrides(tmp_path):
    text = fault_of(tmp_path, "", "epochs", "=3", "dataset.name=x", "epochs=0")
    assert "command line: 'epochs': write key=value" in text
    assert "command line: '=3': write key=value" in text
    assert "only model_params has inner keys" in text
    assert "command line (epochs=0): epochs=0" in text


# --- faults


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("cfg_droput_prob", "cfg_dropout_prob"),
        ("use_emaa", "use_ema"),
        ("batchsize", "batch_size"),
        ("lr", "learning_rate"),
        ("cfg", "cfg_scale"),
        ("learningrate", "learning_rate"),
    ],
)
def test_unknown_keys_get_a_hint(tmp_path, typo, meant):
    message = f"{typo!r} is not a config key; did you mean {meant!r}?"
    assert fault_of(tmp_path, f"{typo}=1") == f"{tmp_path}/run.py:1: {message}"
    assert f"did you mean {meant!r}?" in fault_of(tmp_path, "", f"{typo}=1")


def test_aliases_are_hints_alone():
    assert set(ALIASES).isdisjoint(Config.model_fields)
    assert ALIASES["T"] == "num_timesteps"
    names = [name for rules in RULES.values() for name in rules.get("also", ())]
    assert len(names) == len(set(names)), "a name is given to two keys"


def test_what_a_continued_run_may_change_stands_at_the_keys():
    assert keys_by_resume("architecture") == (
        "model_type",
        "model_params",
        "condition",
        "condition_channels",
        "condition_colors",
        "lora_rank",
        "lora_alpha",
    )
    assert keys_by_resume("run") == ("seed", "batch_size", "optimizer", "use_ema", "ema_snapshots")
    assert "learning_rate" in keys_by_resume("warn")
    kinds = [set(keys_by_resume(kind)) for kind in ("architecture", "meaning", "run", "warn")]
    assert len(set().union(*kinds)) == sum(map(len, kinds)) < len(Config.model_fields)


def test_all_faults_come_at_once_each_with_its_place(tmp_path):
    write(tmp_path, "lr: 1\nseed: 1\nepochs: 0\n", "base.yml")
    body = "\n  _base_='base.yml',\n  batch_size='x',\n  model_params=dict(\n    depht=3,\n  ),\n"
    lines = fault_of(tmp_path, body, "use_ema=yes", "dataset=mnst", "model_params.dropout=a")
    lines = [line.strip() for line in lines.splitlines()]
    base, run = tmp_path / "base.yml", tmp_path / "run.py"
    starts = [
        f"{base}:1: 'lr' is not",
        f"{base}:3: epochs=0",
        f"{run}:3: batch_size='x'",
        f"{run}:5: model_params.depht",
        "command line (use_ema=yes): use_ema='yes'",
        "command line (dataset=mnst): dataset='mnst'",
        "command line (model_params.dropout=a): model_params.dropout='a'",
    ]
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert len(lines) == len(starts)


# Each is refused before anything is written, and the message has the key.
MUTATIONS = [
    "project_name=3",
    "experiment_name=''",
    "experiment_name='..'",
    "experiment_name='a/b'",
    "experiment_name='a\\nb'",
    "experiment_name='x' * 300",
    "resume_path=3",
    "resume_path=''",
    "save_dir=''",
    "seed=-1",
    "seed=1.5",
    "gpu_ids=('a',)",
    "gpu_ids=(-1,)",
    "port=70000",
    "model_type='unett'",
    "model_type=3",
    "model_params=3",
    "model_params=dict(dropout=float('nan'))",
    "model_params=dict(dropout=2.0)",
    "model_params=dict(dropout=True)",
    "model_params=dict(channel_mult=(True, 2))",
    "model_params=dict(model_channels=64.5)",
    "model_params=dict(model_channels=33)",
    "model_params=dict(use_attention=1)",
    "model_params=dict(attention_resolutions=(5,))",
    "model_params=dict(class_conditioning='x')",
    "model_params=dict(in_channels=7)",
    "dataset='digitts'",
    "data_root=None",
    "image_size=0",
    "image_size=(8, 8, 8)",
    "image_size='8x8'",
    "image_size=9",
    "image_channels=2",
    "image_channels=True",
    "conditional='yes'",
    "num_classes=11",
    "num_workers=-1",
    "num_timesteps=1",
    "beta_start=0",
    "beta_start=0.5",
    "beta_end=1.0",
    "beta_schedule='lineer'",
    "process='flwo'",
    "noise_scale=0",
    "loss_space='epsilon'",
    "timestep_sampling='logitnormal'",
    "timestep_mean=1000",
    "timestep_std=0",
    "timestep_shift=-1",
    "prediction_type='epsilon'",
    "loss_type='mse'",
    "loss_weighting='snr'",
    "min_snr_gamma=0",
    "cfg_dropout_prob=1.5",
    "cfg_scale=-1",
    "cfg_interval=(0.5, 0.1)",
    "cfg_interval=(0.5,)",
    "sampling_method='dddim'",
    "num_inference_steps=0",
    "num_inference_steps=2000",
    "ddim_eta=2",
    "timestep_spacing='even'",
    "timestep_spacing_shift=0",
    "cfg_rescale=1.1",
    "threshold='clip'",
    "epochs=0",
    "max_steps=0",
    "batch_size=0",
    "batch_size='abc'",
    "gradient_accumulation_steps=0",
    "optimizer='sgd'",
    "learning_rate=0",
    "learning_rate='2e-4x'",
    "learning_rate=10**400",
    "weight_decay=-0.1",
    "adam_betas=0.9",
    "adam_betas=(0.9, 1.0)",
    "grad_clip=0",
    "precision='fp8'",
    "compile='yes'",
    "use_ema=1",
    "ema_decay=1.0",
    "scheduler_type='cosin'",
    "warmup_epochs=-1",
    "warmup_start_factor=0",
    "step_size=0",
    "gamma=0",
    "save_interval=0",
    "keep_last=0",
    "sample_interval=0",
    "sample_start_epoch=0",
    "num_samples=0",
    "eval_metrics=(1,)",
    "log_interval=0",
    "swanlab_mode='of'",
    "wandb_mode='cloud'",
]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_bad_values_are_refused_by_name(tmp_path, mutation):
    key = mutation.partition("=")[0]
    text = fault_of(tmp_path, mutation)
    assert text.startswith(f"{tmp_path}/run.py:1: ")
    assert key in text
    assert len(text) < 700
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]


def test_conditions_on_each_other(tmp_path):
    assert "num_classes=0" in fault_of(
        tmp_path, "dataset='custom', conditional=True, num_classes=0"
    )
    dropout_0 = "conditional=True, cfg_dropout_prob=0, cfg_scale=3.0"
    assert "cfg_scale=3 needs training with cfg_dropout_prob above 0" in fault_of(
        tmp_path, dropout_0
    )
    load_python(tmp_path, "conditional=True, cfg_dropout_prob=0, cfg_scale=1")
    load_python(tmp_path, "cfg_scale=1")
    steps = "num_inference_steps=30, num_timesteps=20"
    assert "num_inference_steps=30: must lie in 1..20" in fault_of(tmp_path, steps)
    load_python(tmp_path, "beta_start=0.5, beta_end=0.1, beta_schedule='cosine'")


def test_other_weights_go_with_a_run_that_may_not_exist_yet(tmp_path):
    """`resume_path=auto` resumes a run that was stopped, and its first start needs the weights."""
    load_python(tmp_path, "init_from='a.pth', resume_path='auto'")
    both = fault_of(tmp_path, "init_from='a.pth', resume_path='b.pth'")
    assert "give one of them" in both


@pytest.mark.parametrize("scale", [0, 1, 0.5, 2])
def test_an_interval_of_guidance_needs_a_scale_that_guides(scale):
    """With 0 and 1 there is one forward pass and nothing to leave out."""
    config = Config(conditional=True, cfg_scale=scale, cfg_interval=(0.1, 0.5))
    words = "guidance, which is conditional=True and cfg_scale above 1"
    warning = [f"cfg_interval has no effect without {words}"]
    assert warnings_of(config) == (warning if scale in (0, 1) else [])


def test_doubtful_settings_warn():
    assert "sample_start_epoch" in warnings_of(Config(epochs=200, sample_start_epoch=200))[0]
    assert warnings_of(Config(epochs=1)) == []
    unused = Config(use_scheduler=True, scheduler_type="cosine", warmup_epochs=5)
    (warning,) = warnings_of(unused)
    assert warning == "warmup_epochs has no effect without scheduler_type='warmup_cosine'"
    assert warnings_of(Config(ema_decay=0.9, ddim_eta=1.0)) == []
    (warning,) = warnings_of(Config(label_file="x.json", use_subdirs=False))[1:]
    assert warning == "label_file has no effect without dataset='custom'"
    unused = dict(step_size=3, gamma=0.5, min_snr_gamma=2.0, swanlab_mode="local")
    for key, value in (unused | dict(wandb_mode="online")).items():
        (warning,) = warnings_of(Config(**{key: value}))
        assert warning.startswith(f"{key} has no effect without")
    assert warnings_of(Config()) == []
    assert math.isfinite(Config().learning_rate)
