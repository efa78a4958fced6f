"""Your own pictures: one folder per class below data_root. See docs/own_data.md.

python train.py --config configs/custom_folder.py data_root=PATH image_size=64

A run on CIFAR-10 as a folder per class is in docs/results.md.
"""

config = dict(
    dataset="custom",
    data_root="./data/my_images",
    use_subdirs=True,
    image_size=64,
    conditional=True,
    model_type="unet",
    model_params=dict(
        model_channels=96,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        dropout=0.1,
    ),
    cfg_scale=2.0,
    epochs=500,
    batch_size=64,
    learning_rate=2e-4,
    ema_decay=0.9999,
    save_interval=25,
    keep_last=10,
    sample_interval=25,
    num_samples=64,
)
