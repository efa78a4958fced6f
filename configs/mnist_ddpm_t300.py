"""Plain unconditional DDPM on MNIST with T = 300, as in many tutorials.

The betas end at 0.05, not at 0.02, so that 300 steps too arrive at pure noise.

python train.py --config configs/mnist_ddpm_t300.py

Not yet run to the end.
"""

config = dict(
    _base_="mnist_unet.py",
    conditional=False,
    cfg_scale=1.0,
    num_timesteps=300,
    beta_schedule="linear",
    beta_start=1e-4,
    beta_end=0.05,
    prediction_type="eps",
    sampling_method="ddpm",
    num_inference_steps=300,
    epochs=20,
)
