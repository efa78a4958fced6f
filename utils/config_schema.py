"""The one schema of a run's settings. What is true of one key stands at that key: its type and its
default, what it needs to have an effect, whether a continued run may change it, its text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from utils.cli import COMPILE_MODES, read_compile, read_sequence
from utils.config_types import (
    BelowOne,
    Beta,
    Bool,
    Channels,
    Colors,
    Factor,
    Float,
    ImageCount,
    ImageSize,
    Int,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    Numbers,
    PathText,
    PositiveFloat,
    PositiveInt,
    Probability,
    Range,
    Scale,
    Timesteps,
    having,
    key,
)

WARMING_UP = having(use_scheduler=True, scheduler_type="warmup_cosine")
STEPPING = having(use_scheduler=True, scheduler_type="step")
VARIANCES = having(process="ddpm")
RAMP = (
    "process='ddpm' and another beta_schedule than 'cosine'",
    lambda config: config.process == "ddpm" and config.beta_schedule != "cosine",
)
NORMAL = (
    "timestep_sampling='logit_normal' or 'lognormal'",
    lambda config: config.timestep_sampling in ("logit_normal", "lognormal"),
)
ADAPTERS = ("lora_rank above 0", lambda config: config.lora_rank > 0)
DROPPING = ("conditional=True", lambda config: config.conditional or config.cfg_dropout_prob == 0)
SCALED = ("conditional=True, sampling uses 1", lambda c: c.conditional or c.cfg_scale == 1)
GUIDES = "guidance, which is conditional=True and cfg_scale above 1"
GUIDANCE = (GUIDES, lambda config: config.guidance_scale not in (0, 1))
PAIRED = having(condition="folder")
CONDITIONED = ("a condition", lambda config: config.condition is not None)
VALIDATING = ("val_interval above 0", lambda config: config.val_interval > 0)


class Config(BaseModel):
    """Every setting of a run. The texts below the keys are the reference in docs/configs.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    # --- run
    project_name: str = "diffusion"
    """project in SwanLab and W&B"""
    experiment_name: str = key("", also="name")
    """names the run's folder; default: the config file's name"""
    resume_path: PathText | None = key(None, also="resume")
    """checkpoint to go on from, or `auto`: the run's newest one if there is any"""
    init_from: PathText | None = None
    """checkpoint whose weights (EMA, if it has them) a fresh run starts from"""
    seed: NonNegativeInt = key(42, resume="run")
    """fixes weights, data order, noise and samples"""
    gpu_ids: Numbers | None = key(None, also="device gpus gpu_id")
    """CUDA device of each process on this node; default: all in order"""
    port: Annotated[Int, Field(ge=1, le=65535)] | None = None
    """rendezvous port, where the launcher sets no MASTER_PORT"""
    timeout_minutes: Annotated[Float, Field(gt=0, le=10**6)] = 10.0
    """processes that wait longer for another one give up"""

    # --- model
    model_type: Name = key("unet", resume="architecture", also="model backbone")
    """backbone: unet, dit, jit or dim, see below"""
    model_params: dict[str, Any] = key({}, resume="architecture")
    """arguments of the backbone, checked against its signature"""

    # --- data
    dataset: Name = key("digits", resume="warn", also="data")
    """name of a data set, or `custom`: a folder"""
    data_root: PathText = key("./data", also="data_dir data_path")
    """folder that holds the data; of `custom` also a .zip, .tar or .parquet"""
    image_size: ImageSize | None = key(None, resume="warn", also="img_size resolution")
    """side, or (height, width), in pixels; default: the data set's own"""
    image_channels: Channels | None = key(None, also="channels")
    """1 grey, 3 RGB, or as many as array files have; default: the data set's own (`custom`: 3)"""
    value_range: Range | None = key(None, resume="warn", needs=having(dataset="custom"))
    """`custom`, files of 16-bit integers or floats: the values that become -1 and 1; default: the
    least and the largest of the train images"""
    preview_channels: Annotated[Numbers, Field(max_length=3)] | None = None
    """which one or three channels pictures show, counted from 0; default: the first"""
    conditional: Bool = key(False, resume="meaning")
    """condition on the class label"""
    num_classes: NonNegativeInt | None = None
    """checked against the data set; default: what the data set has"""
    use_subdirs: Bool = key(True, needs=having(dataset="custom"))
    """`custom`: one folder per class; False: flat folder"""
    classes: Annotated[Numbers, Field(min_length=1)] | None = key(None, resume="warn")
    """use only the images of these classes, counted from 0; default: all. The model still has all
    of them"""
    label_file: PathText | None = key(None, needs=having(dataset="custom"))
    """`custom`, flat: JSON file `{"img1.jpg": 0}`; without it unlabelled"""
    on_bad_image: Literal["error", "skip"] = key("error", resume="warn")
    """image files that cannot be decoded: stop, or let the next good image take their place (at
    most 1 %), for which all are decoded once at the start"""
    horizontal_flip: Bool | None = key(None, resume="warn")
    """random mirroring; default: on, but off for digits, mnist, fashionmnist and synthetic"""
    num_workers: NonNegativeInt = key(4, also="workers")
    """loader processes of data not held in memory, at most one per core"""
    resident: Bool | None = None
    """hold all images in device memory as uint8; default: if they take at most 1 GiB"""

    condition: Literal["downsample", "grey", "mask", "edges", "folder"] | None = key(
        None, resume="architecture"
    )
    """draw images from pictures of them: of lower resolution, grey, with a hole, edges alone, or
    those of the same names in `condition_root`"""
    condition_factor: Annotated[Int, Field(ge=2, le=64)] = key(
        4, resume="meaning", needs=having(condition="downsample")
    )
    """how many times smaller the sides of the pictures are"""
    condition_root: PathText | None = key(None, needs=PAIRED)
    """folder of the pictures, in the folders that `data_root` has"""
    condition_channels: Channels | None = key(None, resume="architecture", needs=PAIRED)
    """their channels; default: 3"""
    condition_colors: Colors | None = key(None, resume="architecture", needs=PAIRED)
    """colours, or grey levels, of label maps: each becomes a channel of its own"""
    condition_dropout_prob: Probability = key(0.1, resume="warn", needs=CONDITIONED)
    """share of conditions dropped in training"""

    # --- diffusion
    process: str = key("ddpm", resume="meaning")
    """path from image to noise: ddpm (`beta_schedule`), flow (linear) or edm (log-uniform sigma)"""
    num_timesteps: Timesteps = key(1000, resume="meaning", also="timesteps T")
    """T of training"""
    beta_start: Beta = key(1e-4, resume="meaning", needs=RAMP)
    """first beta"""
    beta_end: Beta = key(0.02, resume="meaning", needs=RAMP)
    """last beta"""
    beta_schedule: str = key("linear", resume="meaning", also="schedule", needs=VARIANCES)
    """linear, cosine, quadratic or sigmoid"""
    noise_scale: Scale = key(1.0, resume="meaning")
    """how strong the noise is beside the image, which is divided by it; above 1 for large images"""
    prediction_type: Literal["eps", "x_0", "v"] = key("eps", resume="meaning", also="objective")
    """what the model predicts"""
    loss_space: Literal["eps", "x_0", "v"] | None = key(None, resume="warn")
    """the quantity whose error is the loss; default: what the model predicts"""
    loss_type: Literal["l1", "l2", "huber"] = key("l2", resume="warn")
    """distance to the target"""
    loss_weighting: Literal["uniform", "min_snr"] = key("uniform", resume="warn")
    """weight over t"""
    min_snr_gamma: Annotated[Float, Field(gt=0, le=1e30)] = key(
        5.0, resume="warn", needs=having(loss_weighting="min_snr")
    )
    """cap of the min-SNR weighting"""
    timestep_sampling: str = key("uniform", resume="warn")
    """how training draws t: uniform, logit_normal (in t / T), lognormal (in sigma) or shift"""
    timestep_mean: Annotated[Float, Field(ge=-100, le=100)] = key(0.0, resume="warn", needs=NORMAL)
    """mean of that normal: larger is more noise; JiT 0.8, EDM -1.2"""
    timestep_std: Scale = key(1.0, resume="warn", needs=NORMAL)
    """its standard deviation; JiT 0.8, EDM 1.2"""
    timestep_shift: Scale = key(1.0, resume="warn", needs=having(timestep_sampling="shift"))
    """`shift`: a share u of T becomes k u / (1 + (k - 1) u); k above 1 is more noise"""
    cfg_dropout_prob: Probability | None = key(
        None, resume="warn", needs=DROPPING, also="label_dropout"
    )
    """share of labels dropped in training; default: 0.1 if conditional, else 0"""

    # --- sampling
    cfg_scale: NonNegativeFloat | None = key(None, needs=SCALED, also="cfg guidance_scale w")
    """guidance u + s (c - u): 0 unconditional, 1 conditional, above 1 guided; default: 2 if
    conditional and trained with dropped labels, else 1"""
    cfg_interval: tuple[Probability, Probability] | None = key(None, needs=GUIDANCE)
    """guide only while low <= t / T <= high; outside it is conditional"""
    cfg_rescale: Probability = key(0.0, needs=GUIDANCE)
    """share of the contrast added by guidance that is taken back: 0 none, 1 all"""
    condition_scale: NonNegativeFloat = key(1.0, needs=CONDITIONED)
    """guidance by the condition, as `cfg_scale` by the class: 0 ignores it, 1 is one forward"""
    sampling_method: str = key("ddim", also="sampler diffusion_type")
    """ddpm, ddim, heun or dpmpp_2m"""
    num_inference_steps: PositiveInt | None = key(None, also="steps sample_steps")
    """sampling steps; default: ddpm T, ddim 50, heun 20, dpmpp_2m 20"""
    ddim_eta: Probability = key(0.0, also="eta", needs=having(sampling_method="ddim"))
    """noise of DDIM: 0 none, 1 as DDPM"""
    timestep_spacing: Literal["trailing", "leading", "linspace", "log_snr"] = "trailing"
    """how sampling steps spread over T; `log_snr`: evenly in log(signal / noise)"""
    timestep_spacing_shift: Scale = 1.0
    """above 1 moves sampling steps towards noise, as `timestep_shift` does"""
    threshold: Literal["static", "dynamic", "none"] = "static"
    """bounds predicted x_0: clamp, 99.5 % quantile, or not at all"""

    # --- training
    epochs: PositiveInt = key(100, also="num_epochs n_epochs")
    """passes over the data"""
    max_steps: PositiveInt | None = None
    """stop after so many optimizer steps, if sooner than `epochs`"""
    batch_size: PositiveInt = key(128, resume="run", also="bs")
    """images per optimizer step, over all processes and micro-batches"""
    gradient_accumulation_steps: PositiveInt = key(1, resume="warn", also="accum")
    """micro-batches a batch is cut into: less memory, the same result up to rounding and dropout
    masks"""
    optimizer: str = key("adamw", resume="run")
    """adam, adamw, or muon: matrices in a transformer's blocks by Muon, the rest by AdamW"""
    adam_betas: tuple[BelowOne, BelowOne] = key((0.9, 0.999), resume="warn", also="betas")
    """decays of the moments of Adam and AdamW"""
    learning_rate: PositiveFloat = key(2e-4, resume="warn", also="lr")
    """peak learning rate"""
    weight_decay: NonNegativeFloat = key(0.0, resume="warn", also="wd")
    """decay of the optimizer"""
    grad_clip: PositiveFloat | None = key(1.0, resume="warn")
    """largest gradient norm; None: no limit"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """where loss or gradient is not finite: end the run, or skip the step"""
    max_nonfinite_steps: Annotated[Int, Field(ge=1, le=10_000)] = key(
        10, needs=having(on_nonfinite="skip")
    )
    """`on_nonfinite=skip`: steps a run may skip before it ends"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("auto", resume="warn", also="amp")
    """auto: bf16 on GPUs that have it, else fp32, whose matrix products and convolutions are TF32
    on NVIDIA GPUs"""
    compile: Annotated[Literal[COMPILE_MODES] | None, BeforeValidator(read_compile)] = None
    """torch.compile the backbone: `model` as one, each of its `blocks`, which compiles sooner, or
    `graphs`: blocks that a GPU replays as CUDA graphs; True means `model`"""
    channels_last: Bool = False
    """lay out images and convolutions as (B, H, W, C) in memory; on a GPU only together with
    compile"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """several processes: each holds the model (`ddp`), or each a slice of its weights, gradients,
    average and optimizer state (`fsdp`)"""
    lora_rank: NonNegativeInt = key(0, resume="architecture")
    """above 0: freeze the weights of `init_from` and train low-rank adapters of this rank beside
    them (`pip install peft`)"""
    lora_alpha: PositiveFloat | None = key(None, resume="architecture", needs=ADAPTERS)
    """adapters count lora_alpha / lora_rank; default: lora_rank"""
    use_ema: Bool = key(True, resume="run", also="ema")
    """keep an exponential moving average of the weights"""
    ema_decay: BelowOne = key(0.9999, resume="warn", needs=having(use_ema=True))
    """its decay, after a warm-up"""
    ema_snapshots: NonNegativeInt = key(0, resume="run", needs=having(use_ema=True))
    """epochs between two snapshots, from which `--ema_width` solves for other averages; 0: none"""
    use_scheduler: Bool = key(False, resume="warn")
    """change the learning rate during training"""
    scheduler_type: Literal["cosine", "linear", "step", "warmup_cosine"] = key(
        "cosine", resume="warn", needs=having(use_scheduler=True)
    )
    """how; stepped per optimizer step"""
    warmup_epochs: NonNegativeFloat = key(5, resume="warn", needs=WARMING_UP)
    """`warmup_cosine`: epochs of warm-up"""
    warmup_start_factor: Factor = key(0.01, resume="warn", needs=WARMING_UP)
    """`warmup_cosine`: share of the learning rate to start from"""
    step_size: PositiveInt = key(50, resume="warn", needs=STEPPING, was=30)
    """`step`: epochs between two drops"""
    gamma: Factor = key(0.5, resume="warn", needs=STEPPING, was=0.1)
    """`step`: factor of a drop"""

    # --- files
    save_dir: PathText = key("checkpoints", also="output_dir")
    """the run's folder is made in here"""
    save_interval: PositiveInt = 10
    """epochs between two checkpoints"""
    keep_last: PositiveInt = 3
    """`model_epoch_*.pth` files kept; each one that is deleted is a line of the log"""
    sample_dir: PathText | None = None
    """previews go to its folder of this experiment; default: the run's `samples/`"""
    sample_interval: PositiveInt = 10
    """epochs between two previews"""
    sample_start_epoch: PositiveInt = 1
    """epoch of the first preview"""
    num_samples: ImageCount = 64
    """images of a preview, or of sample.py"""

    # --- evaluation
    eval_metrics: Annotated[tuple[str, ...], BeforeValidator(read_sequence)] = key(
        ("fid", "kid", "is", "lpips", "class_acc", "fd_domain", "memorization", "sanity")
    )
    """what evaluations compute; `all`: everything"""
    eval_num_samples: ImageCount = 50_000
    """images an evaluation draws"""
    eval_interval: NonNegativeInt = 0
    """epochs between evaluations during training; 0: none"""
    eval_best_metric: str | None = None
    """metric, or val_loss, that chooses best_model.pth; None: the training loss"""
    val_interval: NonNegativeInt = 0
    """epochs between validations, the loss of images of the test split; 0: none"""
    val_num_samples: ImageCount = key(2000, needs=VALIDATING)
    """images of a validation, each at 8 timesteps; at most all of the test split"""

    # --- tracking
    log_interval: PositiveInt = 50
    """optimizer steps between two log lines"""
    use_swanlab: Bool = False
    """log to SwanLab as well as to metrics.jsonl"""
    swanlab_mode: Literal["auto", "cloud", "local", "offline", "disabled"] = key(
        "auto", needs=having(use_swanlab=True)
    )
    """auto: cloud with a key, else offline"""
    use_wandb: Bool = False
    """log to Weights & Biases, too (`pip install wandb`)"""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = key(
        "auto", needs=having(use_wandb=True)
    )
    """auto: online with a key, else offline"""
    use_tensorboard: Bool = False
    """write event files to the run's `tensorboard/`, too"""

    @property
    def run_dir(self) -> Path:
        """The folder of the run's checkpoints, logs and reports."""
        return Path(self.save_dir) / self.experiment_name

    @property
    def preview_dir(self) -> Path:
        """The folder that images drawn during training are written to."""
        if self.sample_dir is None:
            return self.run_dir / "samples"
        return Path(self.sample_dir) / self.experiment_name

    @property
    def label_dropout(self) -> float:
        """`cfg_dropout_prob` with its default filled in; 0 without labels."""
        given = 0.1 if self.cfg_dropout_prob is None else self.cfg_dropout_prob
        return given if self.conditional else 0.0

    @property
    def guidance_scale(self) -> float:
        """`cfg_scale` with its default filled in; 1 without labels."""
        default = 2.0 if self.label_dropout > 0 else 1.0
        given = default if self.cfg_scale is None else self.cfg_scale
        return given if self.conditional else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored in checkpoints and config.json."""
        return self.model_dump(mode="json")
