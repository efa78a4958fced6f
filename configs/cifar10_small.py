"""Class-conditional CIFAR-10 shrunk to 16x16 pixels: small enough for a CPU.

python train.py --config configs/cifar10_small.py

1 CPU core, about 20 minutes with precision=bf16: cars, horses and ships can be told
(weights/cifar10_small.md).
"""

config = dict(
    dataset="cifar10",
    image_size=16,
    conditional=True,
    model_type="unet",
    model_params=dict(
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        dropout=0.0,
        use_scale_shift_norm=True,
    ),
    process="flow",
    prediction_type="v",
    timestep_sampling="logit_normal",
    cfg_scale=2.0,
    sampling_method="dpmpp_2m",
    num_inference_steps=20,
    epochs=5,
    batch_size=128,
    learning_rate=1e-3,
    ema_decay=0.999,
    use_scheduler=True,
    scheduler_type="warmup_cosine",
    warmup_epochs=0.25,
    save_interval=1,
    sample_interval=1,
    num_samples=80,
    eval_metrics=("class_acc", "fd_domain", "prdc_domain", "memorization", "sanity"),
    eval_num_samples=2000,
)
