"""Plain unconditional DDPM on MNIST with T = 300 and a 4x4 grid, as in many tutorials.

As there: eps with L2, linear betas from 1e-4, all 300 steps of DDPM, 16 images.

Other than there: the betas end at 0.05, not at 0.02. Those that end at 0.02 are made for 1000
steps: after 300, sqrt(alphas_cumprod[T-1]) = 0.22, so 22 % of the image is left at T, but sampling
starts at pure noise, which such a network has never seen. With 0.05 it is 2 %; beta_end=0.02 is
theirs. Network, batch size and learning rate are those of mnist_unet.py.

python train.py --config configs/mnist_ddpm_t300.py

Not yet run to the end. One CPU core, 3 minutes with batch_size=32 max_steps=600: strokes on black,
few of them digits (docs/results.md).
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
    timestep_sampling="uniform",
    sampling_method="ddpm",
    num_inference_steps=300,
    epochs=20,
    num_samples=16,
)
