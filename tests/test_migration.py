"""What users of other projects write: it works, or a line says what to write instead."""

from __future__ import annotations

import logging
import pickle
import re
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import edit
import evaluate
import export
import runs
import sample
import train
from datasets import build_dataset
from generation.run import CONFIG_CHECKS
from generation.sampling import sampling_from
from tests.conftest import ROOT
from tests.image_files import config as data_config
from tests.image_files import flat, write_flowers102, write_image
from tests.test_bad_input import make_checkpoint
from tests.test_datasets import write_celeba, write_cifar
from training.build import log_start
from training.job import prepare
from training.saving import remove_old_checkpoints
from utils.checkpoint import CURRENT, epoch_name
from utils.config import Config, load_config, warnings_of
from utils.distributed import Runtime
from utils.errors import EXIT_OK, EXIT_USAGE, exit_code_of

# Every key, in the form and with the values that are usual in projects of this family.
UNET = """
config = {
    'project_name': 'Diffusion', 'experiment_name': 'unet_cifar10', 'resume_path': None, 'seed': 42,
    'gpu_ids': [0], 'port': 12355, 'model_type': 'UNet',
    'model_params': {'model_channels': 8, 'channel_mult': (1, 2), 'num_res_blocks': 1,
                     'attention_resolutions': (16,), 'dropout': 0.1},
    'dataset': 'CIFAR10', 'data_root': './data', 'image_size': 32, 'conditional': False,
    'num_classes': 10, 'use_subdirs': True, 'label_file': None, 'num_workers': 4,
    'num_timesteps': 1000, 'beta_start': 1e-4, 'beta_end': 0.02, 'beta_schedule': 'linear',
    'loss_type': 'l2', 'cfg_dropout_prob': 0.2, 'cfg_scale': 1.3, 'num_inference_steps': 50,
    'ddim_eta': 0.0, 'epochs': 200, 'batch_size': 2, 'optimizer': 'adamw', 'learning_rate': 2e-4,
    'weight_decay': 1e-4, 'gradient_accumulation_steps': 1, 'use_ema': True, 'ema_decay': 0.9999,
    'use_scheduler': True, 'scheduler_type': 'warmup_cosine', 'warmup_epochs': 5,
    'warmup_start_factor': 0.01, 'step_size': 50, 'gamma': 0.5, 'save_dir': 'checkpoints',
    'save_interval': 10, 'sample_dir': 'samples', 'sample_interval': 5, 'sample_start_epoch': 20,
    'num_samples': 16, 'use_swanlab': False,
}
"""
DIM = UNET.replace("'UNet'", "'DiM'").replace("'conditional': False", "'conditional': True")
DIM = re.sub(
    r"\{'model_channels.*?\}", "{'patch_size': 8, 'hidden_size': 16, 'depth': 1}", DIM, flags=re.S
)
DIT = DIM.replace("'DiM'", "'DiT'").replace("{'patch", "{'img_size': 32, 'num_heads': 2, 'patch")
FLOWERS = DIT.replace("'CIFAR10'", "'flowers102'").replace("_classes': 10", "_classes': 102")
NO_EFFECT = {"cfg_dropout_prob", "cfg_scale", "use_subdirs", "step_size", "gamma"}
CPU = Runtime(torch.device("cpu"))
CONFIGS = sorted(path for path in (ROOT / "configs").iterdir() if path.is_file())


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command(main, "--option", ...)`: exit code, and what it printed; run from the root."""
    monkeypatch.chdir(ROOT)

    def run(main, *arguments: object) -> tuple[int, str]:
        try:
            code = exit_code_of(lambda: main([str(a) for a in arguments]))
        except SystemExit as stopped:
            code = stopped.code
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return run


# --- configs


@pytest.mark.parametrize("text", [UNET, DIM, FLOWERS], ids=["unet", "dim", "dit on flowers"])
def test_their_configs_dry_run_with_warnings_at_most(command, tmp_path, monkeypatch, text):
    write_cifar(tmp_path / "data", monkeypatch, 10)
    write_flowers102(tmp_path / "data" / "flowers-102")
    path = tmp_path / "theirs.py"
    path.write_text(text)
    options = [f"data_root={tmp_path / 'data'}", f"save_dir={tmp_path}", "sample_dir=none"]
    code, printed = command(train.main, "--config", path, "--dry_run", "--device", "cpu", *options)
    assert code == EXIT_OK, printed
    warned = {line.split()[0] for line in printed.splitlines() if "has no effect without" in line}
    expected = NO_EFFECT if text is UNET else NO_EFFECT - {"cfg_dropout_prob", "cfg_scale"}
    assert warned == expected
    assert "one batch has loss" in printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_can_be_made_unconditional(path):
    config = load_config(path, ["conditional=false"], checks=CONFIG_CHECKS)
    sampling = sampling_from(config)
    assert (sampling.cfg_scale, config.label_dropout) == (1.0, 0.0)
    told = [w for w in warnings_of(config) if w.startswith("cfg_scale has no effect")]
    assert bool(told) == (config.cfg_scale not in (None, 1))
    assert all("conditional=True, sampling uses 1" in warning for warning in told)


def test_skipping_bad_images_of_a_data_set_without_files_is_a_warning(caplog):
    build_dataset(data_config(dataset="digits", on_bad_image="skip"))
    (warning,) = caplog.messages
    assert warning.endswith("without a data set of image files: celeba, flowers102, custom")


def test_a_guidance_that_is_asked_for_and_cannot_be_had_is_an_error(command, tmp_path):
    run = make_checkpoint(tmp_path / "run", cfg_scale=1.3, cfg_dropout_prob=0.2)
    for script in (sample, evaluate):
        code, printed = command(script.main, "--checkpoint", run, "--dry_run", "--cfg_scale", "3")
        assert code == EXIT_USAGE
        assert "needs training with conditional=True" in printed
        code, printed = command(script.main, "--checkpoint", run, "--dry_run", "cfg_scale=3")
        assert code == EXIT_OK  # a key, as in a config file
        assert "cfg_scale has no effect without conditional=True, sampling uses 1" in printed
    code, printed = command(sample.main, "--checkpoint", run, "--dry_run")
    assert code == EXIT_OK
    assert "model without classes" in printed


def test_names_are_read_in_any_capitals_and_paths_as_they_are(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        f"config = dict(_base_={str(ROOT / 'configs/cifar10_unet.py')!r}, model_type='UNet')"
    )
    config = load_config(path, ["dataset=CIFAR10"], checks=CONFIG_CHECKS)
    assert (config.model_type, config.dataset) == ("unet", "cifar10")
    assert config.model_params["model_channels"] == 128  # of the base, whose model it is
    assert Config(model_type="My.nets:Net").model_type == "My.nets:Net"


def test_a_run_goes_on_with_the_defaults_it_began_with(tiny):
    """`step_size` and `gamma` were 30 and 0.1; a config that names them has its way."""
    old = load_config(
        tiny, ["use_scheduler=true", "scheduler_type=step", "step_size=30", "gamma=0.1"]
    )
    make_run(old, {"max_steps": 1})
    again = ["use_scheduler=true", "scheduler_type=step", "resume_path=auto", "max_steps=2"]
    going_on = prepare(load_config(tiny, again), CPU)
    assert (going_on.config.step_size, going_on.config.gamma) == (30, 0.1)
    named = prepare(load_config(tiny, [*again, "gamma=0.5"]), CPU)
    assert (named.config.step_size, named.config.gamma) == (30, 0.5)
    assert (Config().step_size, Config().gamma) == (50, 0.5)


def make_run(config: Config, values: dict) -> None:
    train.train(config.model_copy(update=values), CPU, dry_run=False)


@pytest.mark.parametrize(
    ("world_size", "accumulation", "words"),
    [
        (1, 1, "steps, 64 images a step, "),
        (1, 2, "64 images a step (32 per process x 2)"),
        (4, 2, "64 images a step (8 per GPU x 4 GPUs x 2)"),
    ],
)
def test_the_plan_says_what_a_step_is_made_of(
    tiny, monkeypatch, caplog, world_size, accumulation, words
):
    config = load_config(tiny, [f"gradient_accumulation_steps={accumulation}"])
    job = prepare(config, CPU)
    if world_size > 1:
        monkeypatch.setattr("training.build.describe_device", lambda device: "4 GPUs")
        runtime = Runtime(torch.device("cuda"), world_size=world_size)
        job = type(job)(**{**vars(job), "runtime": runtime})
    with caplog.at_level(logging.INFO):
        log_start(job)
    (plan,) = [line for line in caplog.messages if line.startswith("plan:")]
    assert words in plan


def test_a_run_that_trains_on_is_not_told_of_its_only_preview(tiny, caplog):
    job = prepare(load_config(tiny, ["epochs=2", "sample_start_epoch=2"]), CPU)
    log_start(job)
    assert "sample_start_epoch=2 with epochs=2: there will be at most one preview" in caplog.text
    caplog.clear()
    extended = replace(job.schedule, total_steps=2 * job.schedule.total_steps, is_extension=True)
    log_start(replace(job, schedule=extended))
    assert "at most one preview" not in caplog.text


# --- checkpoints

THEIRS = {
    "another project": {
        "epoch": 3,
        "model_state_dict": {"w": torch.ones(2)},
        "best_loss": 0.1,
        "config": {},
    },
    "lightning": {"state_dict": {"w": torch.ones(2)}, "pytorch-lightning_version": "2.0"},
    "bare weights": {"w": torch.ones(2)},
}


@pytest.mark.parametrize("kind", [*THEIRS, "objects", "pickle"])
def test_checkpoints_of_other_projects_are_recognised(command, tmp_path, kind):
    path = tmp_path / "model.pth"
    if kind in THEIRS:
        torch.save(THEIRS[kind], path)
    elif kind == "objects":
        torch.save({"args": logging.getLogger}, path)
    else:
        path.write_bytes(pickle.dumps({"ema": Path("x")}))
    code, printed = command(sample.main, "--checkpoint", path)
    assert code == 1
    assert (
        "its network cannot be loaded here; train again with its config, see docs/migration.md"
        in printed
    )
    assert printed.count("\n") == 1
    for key in THEIRS.get(kind, ()):
        assert key in printed or kind == "bare weights"


def test_a_cut_off_checkpoint_is_not_taken_for_one_of_another_project(command, tmp_path):
    run = make_checkpoint(tmp_path / "run")
    content = (run / CURRENT).read_bytes()
    (run / CURRENT).write_bytes(content[: len(content) // 2])
    assert "docs/migration.md" not in command(sample.main, "--checkpoint", run)[1]


def test_a_missing_checkpoint_names_the_runs_that_are_there(command, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    for name in ("a", "b"):
        make_checkpoint(tmp_path / "checkpoints" / name)
    monkeypatch.chdir(tmp_path)
    for given in (
        "checkpoints/best_model.pth",
        "checkpoints",
        "gone",
        "checkpoints/c/best_model.pth",
    ):
        code, printed = command(sample.main, "--checkpoint", given)
        assert code == 1
        assert "; runs in checkpoints: a, b\n" in printed
    config = ROOT / "configs" / "digits_unet.py"
    code, printed = command(train.main, "--config", config, "resume_path=checkpoints/gone.pth")
    assert (code, "; runs in checkpoints: a, b\n" in printed) == (1, True)


def test_every_deletion_is_told(tmp_path, caplog):
    for epoch in (1, 2, 3):
        (tmp_path / epoch_name(epoch)).touch()
    with caplog.at_level(logging.INFO):
        remove_old_checkpoints(tmp_path, 1)
    assert [line.partition(": ")[0] for line in caplog.messages] == [
        f"deleted {tmp_path / epoch_name(epoch)}" for epoch in (1, 2)
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_of_long_runs_keep_more_epochs(path):
    config = load_config(path)
    assert config.keep_last >= (10 if config.epochs > 100 else 1)


# --- command lines


def test_zero_guidance_says_that_it_ignores_labels(command, tmp_path):
    run = make_checkpoint(tmp_path / "run", conditional=True)
    printed = command(sample.main, "--checkpoint", run, "--cfg_scale", 0, "--dry_run")[1]
    assert "unconditional: labels are ignored; 1 is conditional without guidance" in printed


@pytest.mark.parametrize("name", ["foo.png", "foo.GIF"])
def test_the_suffix_of_an_output_name_is_not_doubled(command, tmp_path, name):
    run = make_checkpoint(tmp_path / "run")
    options = ["--num_samples", 1, "--output_dir", tmp_path / "out", "--output_name", name]
    assert command(sample.main, "--checkpoint", run, *options)[0] == EXIT_OK
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["foo.png"]


FOREIGN = [
    (
        train,
        "--dataset mnist --epochs 6 --channels 1 --lr 1e-4",
        "write dataset=mnist epochs=6 image_channels=1 learning_rate=1e-4 behind "
        "--config configs/mnist_unet.py;",
    ),
    (train, "--dataset=CelebA --batch-size=8", "behind --config configs/celeba_unet.py;"),
    (
        train,
        "--config configs/mnist_unet.py --n-epochs 3 --gpu_ids 0 1",
        "write epochs=3 gpu_ids=0,1 behind the other options;",
    ),
    (
        train,
        "--config configs/cifar10_unet.py --gpus 0,1",
        "write gpu_ids=0,1 behind the other options;",
    ),
    (train, "--epochs 3 --conditional", "write epochs=3 conditional=true behind --config FILE;"),
    (sample, "--n_samples 4", "--n_samples: did you mean '--num_samples'?"),
    (sample, "--checkpoint x --sampler ddim", "--sampler: did you mean '--sampling_method'?"),
    (evaluate, "--ckpt x --cfg 3", "--cfg: did you mean '--cfg_scale'?"),
    (edit, "img2img --ckpt x --strenght 1", "--strenght: did you mean '--strength'?"),
    (export, "--ckpt x --format diffusers --out y", "--out: did you mean '--output'?"),
    (runs, "--jsn", "--jsn: did you mean '--json'?"),
]


@pytest.mark.parametrize(("script", "line", "words"), FOREIGN, ids=lambda value: str(value)[:30])
def test_options_of_other_projects_are_translated(command, script, line, words):
    code, printed = command(script.main, *line.split())
    assert code == EXIT_USAGE
    assert words in printed
    assert printed.count("\n") == 1


# In the order of the usual README, whose 10,000 images are 10 here, and 1000 timesteps 50.
RUN = "checkpoints/cifar10-unet-ddpm"
SMALL = {
    "'unet_cifar10'": "'cifar10-unet-ddpm'",
    "'CIFAR10'": "'digits'",
    "'img_size': 32": "'img_size': (8, 8)",
    "'image_size': 32": "'image_size': (8, 8)",
    "'num_timesteps': 1000": "'num_timesteps': 50",
    "'epochs': 200": "'epochs': 1",
    "'batch_size': 2": "'batch_size': 128",
    "'save_interval': 10": "'save_interval': 1, 'eval_metrics': ('sanity',)",
    "'sample_dir': 'samples', 'sample_interval': 5, 'sample_start_epoch': 20": (
        "'sample_dir': './generated_images', 'sample_interval': 1, 'sample_start_epoch': 1"
    ),
}
THEIR_LINES = [
    (
        sample,
        f"--checkpoint {RUN}/best_model.pth --sampling_method ddpm --num_samples 64 --batch_size 16"
        " --output_dir ./generated_images --use_ema",
        "64 images: ddpm, 50 steps, guided, cfg_scale 1.3",
        "generated_images/samples.png",
    ),
    (
        sample,
        f"--checkpoint {RUN}/best_model.pth --sampling_method ddim --num_inference_steps 50"
        " --num_samples 64 --use_ema",
        "64 images: ddim, 50 steps, guided, cfg_scale 1.3",
        "samples/samples.png",
    ),
    (
        sample,
        "--checkpoint checkpoints/best_model.pth --sampling_method ddim --cfg_scale 4.0"
        " --labels 0,1,2,3 --use_ema",
        "16 images: ddim, 50 steps, guided, cfg_scale 4",
        "samples/samples.png",
    ),
    (
        sample,
        "--checkpoint checkpoints/best_model.pth --create_gif --output_dir ./results",
        "16 images: ddim, 50 steps",
        "results/samples.gif",
    ),
    (
        sample,
        "--checkpoint checkpoints/best_model.pth --create_gif --save_intermediate"
        " --output_dir ./results",
        "16 images: ddim, 50 steps",
        "results/samples_steps/049.png",
    ),
    (
        sample,
        "--checkpoint checkpoints/best_model.pth --sampling_method ddim --num_inference_steps 50"
        " --create_gif",
        "16 images: ddim, 50 steps",
        "samples/samples.gif",
    ),
    (
        evaluate,
        "--checkpoint checkpoints/best_model.pth --num_samples 10 --batch_size 32"
        " --save_images_dir ./eval_generated_images --use_ema --output metrics_report.json",
        "report: metrics_report.html",
        "eval_generated_images/000009.png metrics_report.json",
    ),
    (
        train,
        f"--config configs/cifar10_unet.py resume_path={RUN}/model_epoch_0001.pth",
        "epochs=1, but 1 are done: training 1 more, to epoch 2",
        f"{RUN}/model_epoch_0002.pth generated_images/cifar10-unet-ddpm/epoch_0002.png",
    ),
]


@pytest.fixture(scope="module")
def their_folder(tmp_path_factory):
    """A folder as it is after their first command, `train.py --config configs/cifar10_unet.py`."""
    folder, text = tmp_path_factory.mktemp("theirs"), DIT
    for theirs, small in SMALL.items():
        assert theirs in text
        text = text.replace(theirs, small)
    (folder / "configs").mkdir()
    (folder / "configs" / "cifar10_unet.py").write_text(text)
    with chdir(folder):
        assert train.main(["--config", "configs/cifar10_unet.py"]) == EXIT_OK
    return folder


@pytest.mark.parametrize(
    ("script", "line", "words", "written"), THEIR_LINES, ids=lambda value: str(value)[-30:]
)
def test_their_command_lines_work(
    command, their_folder, tmp_path, monkeypatch, script, line, words, written
):
    shutil.copytree(their_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "checkpoints/best_model.pth" in line:
        code, printed = command(script.main, *line.split())
        assert (code, "; runs in checkpoints: cifar10-unet-ddpm\n" in printed) == (1, True)
        line = line.replace("checkpoints/best", f"{RUN}/best")
    code, printed = command(script.main, *line.split())
    assert (code, words in printed) == (EXIT_OK, True), printed
    assert all((tmp_path / name).is_file() for name in written.split())


def test_runs_takes_what_all_scripts_take(command, tiny, tmp_path):
    make_run(load_config(tiny), {"max_steps": 1})
    folder = tmp_path / "checkpoints" / "tiny"
    assert '"batch_size": 64' in command(runs.main, folder, "--print_config")[1]
    code, printed = command(runs.main, "report", folder, "--dry_run")
    assert (code, "not written" in printed) == (EXIT_OK, True)
    assert not (folder / "report.html").exists()


# --- data


@pytest.mark.parametrize(
    "labels",
    [
        {"0.png": 0, "1.png": 1},
        {"0.png": 0, "1.png": 1, "2.png": 1, "9.png": 0},
        {"0.png": 0, "1.png": 2, "2.png": 2},
    ],
    ids=["some images only", "absent ones", "gaps"],
)
def test_an_incomplete_label_file_comes_with_lines_that_complete_it(tmp_path, labels):
    with pytest.raises(ValueError, match="how to fix: these three lines of Python") as caught:
        build_dataset(flat(tmp_path, labels))
    exec("\n".join(line.strip() for line in str(caught.value).splitlines()[-3:]), {})
    settings = flat(tmp_path, labels).model_copy(update={"label_file": "labels_complete.json"})
    dataset = build_dataset(settings)
    expected = [0, 1, 2] if len(labels) == 2 else [0, 1, 1]
    assert dataset.labels.tolist() == expected


def test_celeba_is_found_as_unpacked_and_split_by_number(tmp_path, caplog):
    root = tmp_path / "CelebA"
    for number in (1, 162_770, 162_771, 182_637, 182_638, 202_599):
        write_image(root / "Img_align_celeba" / f"{number:06d}.jpg", (218, 178))
    settings = data_config(dataset="celeba", data_root=str(tmp_path))
    assert build_dataset(settings).names == ["000001.jpg", "162770.jpg"]
    assert build_dataset(settings, "test").names == ["182638.jpg", "202599.jpg"]
    assert "2 of 162,770 train images" in caplog.text
    assert "2 of 19,962 test images" in caplog.text
    write_celeba(tmp_path / "with a list")
    listed = data_config(dataset="celeba", data_root=str(tmp_path / "with a list"))
    assert build_dataset(listed).names == ["000000.jpg", "000003.jpg", "000006.jpg"]


def test_celeba_has_no_labels_and_says_where_to_read_on(command):
    code, printed = command(train.main, "--config", "configs/celeba_unet.py", "conditional=true")
    assert (code, "docs/migration.md" in printed) == (EXIT_USAGE, True)
