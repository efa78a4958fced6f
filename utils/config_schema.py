"""The one schema of a run's settings: keys, types, defaults, descriptions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# pydantic's own lax mode takes True for 1, "no" for False and 1 for True. Here a bool is never a
# number, and a number is never a bool; "2e-4" is a float because PyYAML reads it as a string.


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("a number is needed") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number is needed")
    return value


def _integer(value: Any) -> Any:
    value = _number(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError("a whole number is needed")
        return int(value)
    return value


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("only True or False is allowed")
    return value


def _sequence(value: Any) -> Any:
    return (
        (value,) if isinstance(value, int | float | str) and not isinstance(value, bool) else value
    )


Int = Annotated[int, BeforeValidator(_integer)]
Float = Annotated[float, BeforeValidator(_number)]
Bool = Annotated[bool, BeforeValidator(_flag)]
PositiveInt = Annotated[Int, Field(ge=1, le=2**31 - 1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Probability = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
Classes = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_sequence), Field(min_length=1)]


def _image_size(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError("one side or (height, width) is needed")
        return tuple(_integer(side) for side in value)
    side = _integer(value)
    return (side, side)


def _compile(value: Any) -> Any:
    return {True: "model", False: None}[value] if isinstance(value, bool) else value


Side = Annotated[Int, Field(ge=1, le=2**14)]
ImageSize = Annotated[tuple[Side, Side], BeforeValidator(_image_size)]


class Config(BaseModel):
    """Every setting of a run. The field descriptions are the reference in docs/configs.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # --- run
    project_name: str = Field("diffusion", description="SwanLab project")
    experiment_name: str = Field(
        "", description="names the run's folder; default: the config file's name"
    )
    resume_path: str | None = Field(
        None,
        description="checkpoint to go on from, or `auto`: the run's newest one if there is any",
    )
    init_from: str | None = Field(
        None, description="checkpoint whose weights (EMA, if it has them) a fresh run starts from"
    )
    seed: NonNegativeInt = Field(42, description="fixes weights, data order, noise and samples")
    gpu_ids: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_sequence)] | None = Field(
        None, description="CUDA device of each process on this node; default: all in order"
    )
    port: Annotated[Int, Field(ge=1, le=65535)] | None = Field(
        None, description="rendezvous port, where the launcher sets no MASTER_PORT"
    )
    timeout_minutes: PositiveFloat = Field(
        10.0, description="processes that wait longer for another one give up"
    )

    # --- model
    model_type: str = Field("unet", description="backbone: unet, dit or dim, see below")
    model_params: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the backbone, checked against its signature"
    )

    # --- data
    dataset: str = Field("digits", description="name of a data set, or `custom`: a folder")
    data_root: str = Field("./data", description="folder that holds the data")
    image_size: ImageSize | None = Field(
        None, description="side, or (height, width), in pixels; default: the data set's own"
    )
    image_channels: Annotated[Literal[1, 3], BeforeValidator(_integer)] | None = Field(
        None, description="1 grey or 3 RGB; default: the data set's own (`custom`: 3)"
    )
    conditional: Bool = Field(False, description="condition on the class label")
    num_classes: NonNegativeInt | None = Field(
        None, description="checked against the data set; default: what the data set has"
    )
    use_subdirs: Bool = Field(
        True, description="`custom`: one folder per class; False: flat folder"
    )
    classes: Classes | None = Field(
        None,
        description="use only the images of these classes, counted from 0; default: all. The "
        "model still has all of them",
    )
    label_file: str | None = Field(
        None, description='`custom`, flat: JSON file `{"img1.jpg": 0}`; without it unlabelled'
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error",
        description="image files that cannot be decoded: stop, or let the next good image take "
        "their place (at most 1 %), for which all are decoded once at the start",
    )
    horizontal_flip: Bool | None = Field(
        None, description="random mirroring; default: on, but off for digits, mnist and synthetic"
    )
    num_workers: NonNegativeInt = Field(
        4, description="loader processes of data not held in memory, at most one per core"
    )
    resident: Bool | None = Field(
        None,
        description="hold all images in device memory as uint8; default: if they take at most "
        "1 GiB",
    )

    # --- diffusion
    num_timesteps: Annotated[Int, Field(ge=2, le=10**6)] = Field(1000, description="T of training")
    beta_start: Annotated[Float, Field(gt=0, lt=1)] = Field(1e-4, description="first beta")
    beta_end: Annotated[Float, Field(gt=0, lt=1)] = Field(0.02, description="last beta")
    beta_schedule: str = Field("linear", description="linear, cosine or quadratic")
    prediction_type: Literal["eps", "x_0", "v"] = Field(
        "eps", description="what the model predicts"
    )
    loss_type: Literal["l1", "l2", "huber"] = Field("l2", description="distance to the target")
    loss_weighting: Literal["uniform", "min_snr"] = Field("uniform", description="weight over t")
    min_snr_gamma: PositiveFloat = Field(5.0, description="cap of the min-SNR weighting")
    cfg_dropout_prob: Probability | None = Field(
        None, description="share of labels dropped in training; default: 0.1 if conditional, else 0"
    )

    # --- sampling
    cfg_scale: NonNegativeFloat | None = Field(
        None,
        description="guidance u + s (c - u): 0 unconditional, 1 conditional, above 1 guided; "
        "default: 2 if conditional and trained with dropped labels, else 1",
    )
    cfg_interval: tuple[Probability, Probability] | None = Field(
        None, description="guide only while low <= t / T <= high; outside it is conditional"
    )
    sampling_method: str = Field("ddim", description="ddpm, ddim or dpmpp_2m")
    num_inference_steps: PositiveInt | None = Field(
        None, description="sampling steps; default: ddpm T, ddim 50, dpmpp_2m 20"
    )
    ddim_eta: Probability = Field(0.0, description="noise of DDIM: 0 none, 1 as DDPM")
    timestep_spacing: Literal["trailing", "leading", "linspace"] = Field(
        "trailing", description="how sampling steps spread over T"
    )
    threshold: Literal["static", "dynamic", "none"] = Field(
        "static", description="bounds predicted x_0: clamp, 99.5 % quantile, or not at all"
    )

    # --- training
    epochs: PositiveInt = Field(100, description="passes over the data")
    max_steps: PositiveInt | None = Field(
        None, description="stop after so many optimizer steps, if sooner than `epochs`"
    )
    batch_size: PositiveInt = Field(
        128, description="images per optimizer step, over all processes and micro-batches"
    )
    gradient_accumulation_steps: PositiveInt = Field(
        1,
        description="micro-batches a batch is cut into: less memory, the same result up to "
        "rounding and dropout masks",
    )
    optimizer: Literal["adam", "adamw"] = Field("adamw", description="fused where possible")
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate")
    weight_decay: NonNegativeFloat = Field(0.0, description="decay of the optimizer")
    grad_clip: PositiveFloat | None = Field(
        1.0, description="largest gradient norm; None: no limit"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="where loss or gradient is not finite: end the run, or skip the step"
    )
    max_nonfinite_steps: Annotated[Int, Field(ge=1, le=10_000)] = Field(
        10, description="`on_nonfinite=skip`: steps a run may skip before it ends"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 on GPUs that have it, else fp32, whose matrix products and "
        "convolutions are TF32 on NVIDIA GPUs",
    )
    compile: Annotated[Literal["model", "blocks"] | None, BeforeValidator(_compile)] = Field(
        None,
        description="torch.compile the backbone: `model` as one, or each of its `blocks`, which "
        "compiles sooner; True means `model`",
    )
    channels_last: Bool = Field(
        False, description="lay out images and convolutions as (B, H, W, C) in memory"
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="several processes: each holds the model (`ddp`), or each a slice of its "
        "weights, gradients, average and optimizer state (`fsdp`)",
    )
    lora_rank: NonNegativeInt = Field(
        0,
        description="above 0: freeze the weights of `init_from` and train low-rank adapters of "
        "this rank beside them (`pip install peft`)",
    )
    lora_alpha: PositiveFloat | None = Field(
        None, description="adapters count lora_alpha / lora_rank; default: lora_rank"
    )
    use_ema: Bool = Field(True, description="keep an exponential moving average of the weights")
    ema_decay: BelowOne = Field(0.9999, description="its decay, after a warm-up")
    use_scheduler: Bool = Field(False, description="change the learning rate during training")
    scheduler_type: Literal["cosine", "linear", "step", "warmup_cosine"] = Field(
        "cosine", description="how; stepped per optimizer step"
    )
    warmup_epochs: NonNegativeFloat = Field(5, description="`warmup_cosine`: epochs of warm-up")
    warmup_start_factor: Annotated[Float, Field(gt=0, le=1)] = Field(
        0.01, description="`warmup_cosine`: share of the learning rate to start from"
    )
    step_size: PositiveInt = Field(30, description="`step`: epochs between two drops")
    gamma: Annotated[Float, Field(gt=0, le=1)] = Field(0.1, description="`step`: factor of a drop")

    # --- files
    save_dir: str = Field("checkpoints", description="the run's folder is made in here")
    save_interval: PositiveInt = Field(10, description="epochs between two checkpoints")
    keep_last: PositiveInt = Field(3, description="`model_epoch_*.pth` files kept")
    sample_dir: str | None = Field(
        None,
        description="previews go to its folder of this experiment; default: the run's `samples/`",
    )
    sample_interval: PositiveInt = Field(10, description="epochs between two previews")
    sample_start_epoch: PositiveInt = Field(1, description="epoch of the first preview")
    num_samples: PositiveInt = Field(64, description="images of a preview, or of sample.py")

    # --- evaluation
    eval_metrics: Annotated[tuple[str, ...], BeforeValidator(_sequence)] = Field(
        ("fid", "kid", "is", "lpips", "class_acc", "fd_domain", "memorization", "sanity"),
        description="what evaluations compute; `all`: everything",
    )
    eval_num_samples: PositiveInt = Field(50_000, description="images an evaluation draws")
    eval_interval: NonNegativeInt = Field(
        0, description="epochs between evaluations during training; 0: none"
    )
    eval_best_metric: str | None = Field(
        None, description="metric that chooses best_model.pth; None: the training loss"
    )

    # --- tracking
    log_interval: PositiveInt = Field(50, description="optimizer steps between two log lines")
    use_swanlab: Bool = Field(False, description="log to SwanLab as well as to metrics.jsonl")
    swanlab_mode: Literal["auto", "cloud", "local", "offline", "disabled"] = Field(
        "auto", description="auto: cloud with a key, else offline"
    )
    use_tensorboard: Bool = Field(
        False, description="write event files to the run's `tensorboard/`, too"
    )

    @property
    def run_dir(self) -> Path:
        return Path(self.save_dir) / self.experiment_name

    @property
    def preview_dir(self) -> Path:
        if self.sample_dir is None:
            return self.run_dir / "samples"
        return Path(self.sample_dir) / self.experiment_name

    @property
    def label_dropout(self) -> float:
        """`cfg_dropout_prob` with its default filled in."""
        if self.cfg_dropout_prob is not None:
            return self.cfg_dropout_prob
        return 0.1 if self.conditional else 0.0

    @property
    def guidance_scale(self) -> float:
        """`cfg_scale` with its default filled in."""
        if self.cfg_scale is not None:
            return self.cfg_scale
        return 2.0 if self.conditional and self.label_dropout > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored in checkpoints and config.json."""
        return self.model_dump(mode="json")
