"""From one kind of picture to another: two folders of files with the same names. See
docs/conditioning.md.

python train.py --config configs/custom_translation.py data_root=DIR condition_root=DIR

Run for a few steps only, on made-up pairs.
"""

config = dict(
    dataset="custom",
    data_root="./data/pairs/images",
    use_subdirs=False,
    image_size=64,
    condition="folder",
    condition_root="./data/pairs/pictures",
    model_type="unet",
    model_params=dict(
        model_channels=96,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        dropout=0.1,
    ),
    beta_schedule="cosine",
    prediction_type="v",
    epochs=500,
    batch_size=64,
    learning_rate=2e-4,
    ema_decay=0.9999,
    save_interval=25,
    keep_last=10,
    sample_interval=25,
    num_samples=16,
    eval_metrics=("psnr", "ssim", "sanity"),
)
