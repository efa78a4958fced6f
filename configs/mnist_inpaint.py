"""Inpainting of MNIST: what was in the hole. See docs/conditioning.md.

python train.py --config configs/mnist_inpaint.py

Not yet run.
"""

config = dict(
    dataset="mnist",
    condition="mask",
    model_type="unet",
    model_params=dict(
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(7,),
        dropout=0.05,
        use_scale_shift_norm=True,
    ),
    beta_schedule="cosine",
    prediction_type="v",
    epochs=5,
    batch_size=128,
    learning_rate=1e-3,
    ema_decay=0.999,
    use_scheduler=True,
    scheduler_type="warmup_cosine",
    warmup_epochs=0.2,
    save_interval=1,
    sample_interval=1,
    num_samples=16,
    num_inference_steps=50,
    eval_metrics=("psnr", "ssim", "sanity"),
    eval_num_samples=1000,
)
