"""Images of five channels of floats, one .npy file each. See docs/own_data.md.

python train.py --config configs/custom_multichannel.py data_root=PATH image_channels=5

Hardware: any GPU. Time and result: not yet run.
"""

config = dict(
    dataset="custom",
    data_root="./data/my_arrays",
    use_subdirs=False,
    image_channels=5,
    image_size=64,
    preview_channels=(0, 1, 2),
    horizontal_flip=False,
    model_type="unet",
    model_params=dict(
        model_channels=64,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
    ),
    epochs=200,
    keep_last=10,
    batch_size=64,
    learning_rate=2e-4,
    ema_decay=0.999,
    eval_metrics=("sanity", "memorization"),
)
