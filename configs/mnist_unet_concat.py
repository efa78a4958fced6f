"""Class-conditional MNIST, the class concatenated to the image as 4 extra input channels.

The recipe of the tutorials that build on diffusers' UNet2DModel. As there: block widths 32, 64, 64
with two layers each, attention in heads of 8 channels at 14 and 7 pixels, groups of 32, no dropout;
eps with L2, T = 1000, linear betas, Adam at 1e-3, 512 images a step, labels always given (so there
is no guidance), a 10 x 8 grid by DDIM in 50 steps.

Other than there: DDIM starts at the last timestep, not at 980 as with timestep_spacing="leading",
diffusers' default. An average of the weights is kept beside them and sampled from; --no_ema takes
the raw ones. Some of these tutorials take 128 images a step and cosine betas: batch_size=128
beta_schedule=cosine.

python train.py --config configs/mnist_unet_concat.py

Not yet run to the end. One CPU core, about 22 minutes with batch_size=64 max_steps=826: digits of
the class that was asked for, but on tinted backgrounds, requested-class accuracy 0.18; that is too
short (docs/results.md).
"""

config = dict(
    dataset="mnist",
    conditional=True,
    model_type="unet",
    model_params=dict(
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(14, 7),
        num_head_channels=8,
        norm_groups=32,
        dropout=0.0,
        class_conditioning="concat",
        class_emb_size=4,
    ),
    num_timesteps=1000,
    beta_schedule="linear",
    prediction_type="eps",
    cfg_dropout_prob=0.0,
    cfg_scale=1.0,
    sampling_method="ddim",
    num_inference_steps=50,
    epochs=10,
    batch_size=512,
    optimizer="adam",
    learning_rate=1e-3,
    grad_clip=None,
    ema_decay=0.999,
    save_interval=1,
    sample_interval=1,
    num_samples=80,
    eval_metrics=("class_acc", "fd_domain", "prdc_domain", "memorization", "sanity"),
    eval_num_samples=10_000,
)
