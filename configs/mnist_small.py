"""MNIST in ten CPU minutes: a narrow UNet and a flow, trained most where there is much noise.

python train.py --config configs/mnist_small.py
1 CPU core with AVX-512 BF16, 9 minutes: requested-class accuracy 1.00, without guidance 0.97
(docs/results.md).
"""

config = dict(
    dataset="mnist",
    conditional=True,
    model_type="unet",
    model_params=dict(
        model_channels=16,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        attention_resolutions=(7,),
        dropout=0.05,
        use_scale_shift_norm=True,
    ),
    process="flow",
    prediction_type="v",
    timestep_sampling="logit_normal",
    timestep_mean=1.0,
    cfg_scale=2.0,
    sampling_method="ddpm",
    num_inference_steps=30,
    timestep_spacing_shift=4.0,
    max_steps=2450,
    batch_size=64,
    learning_rate=2e-3,
    ema_decay=0.998,
    use_scheduler=True,
    scheduler_type="warmup_cosine",
    warmup_epochs=0.05,
    precision="bf16",
    save_interval=1,
    sample_interval=1,
    num_samples=80,
    # FID says little about grey digits
    eval_metrics=("class_acc", "fd_domain", "prdc_domain", "lpips", "memorization", "sanity"),
    eval_num_samples=1000,
)
