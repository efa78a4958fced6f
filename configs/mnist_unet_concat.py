"""Class-conditional MNIST, the class concatenated to the image as extra input channels.

Block widths 32, 64, 64, as many tutorials have them; DDIM in 50 steps.

python train.py --config configs/mnist_unet_concat.py

Not yet run to the end.
"""

config = dict(
    _base_="mnist_unet.py",
    model_params=dict(
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(14, 7),
        use_scale_shift_norm=False,
        class_conditioning="concat",
        class_emb_size=4,
    ),
    sampling_method="ddim",
    num_inference_steps=50,
)
