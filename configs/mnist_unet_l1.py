"""Class-guided MNIST with the L1 loss: the recipe of owenliang/pytorch-diffusion.

As there: eps with L1, T = 1000, linear betas, Adam at 1e-3, 200 epochs of 400 images a step, labels
always given (so there is no guidance), all 1000 steps of DDPM.

Other than there: the UNet is this project's, and the class is added to the timestep instead of
attended to. Images keep their 28 pixels (there 48, which costs three times as much and adds no
detail; image_size=48 does it). Sampling bounds the predicted x_0, not x_t itself. An average of the
weights is kept beside them and sampled from; --no_ema takes the raw ones.

python train.py --config configs/mnist_unet_l1.py

Not yet run to the end. One CPU core, 8 minutes with batch_size=64 max_steps=900: requested-class
accuracy 0.86; with cfg_dropout_prob=0.1, which guidance needs, 0.84 without and 0.95 with
cfg_scale=2 (docs/results.md).
"""

config = dict(
    dataset="mnist",
    conditional=True,
    model_type="unet",
    model_params=dict(
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(7,),
        dropout=0.0,
        use_scale_shift_norm=True,
    ),
    num_timesteps=1000,
    beta_schedule="linear",
    prediction_type="eps",
    loss_type="l1",
    cfg_dropout_prob=0.0,
    cfg_scale=1.0,
    sampling_method="ddpm",
    num_inference_steps=1000,
    epochs=200,
    batch_size=400,
    optimizer="adam",
    learning_rate=1e-3,
    grad_clip=None,
    ema_decay=0.999,
    keep_last=10,
    num_samples=80,
    eval_metrics=("class_acc", "fd_domain", "prdc_domain", "memorization", "sanity"),
    eval_num_samples=10_000,
)
