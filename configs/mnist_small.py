"""MNIST in ten CPU minutes: a narrow UNet and a flow, trained most where there is much noise.

python train.py --config configs/mnist_small.py
1 CPU core with AVX-512 BF16, 9 minutes: requested-class accuracy without guidance 0.97
(docs/results.md).
"""

config = dict(
    _base_="mnist_unet.py",
    model_params=dict(model_channels=16, channel_mult=(1, 2, 4)),
    process="flow",
    timestep_mean=1.0,
    sampling_method="ddpm",
    num_inference_steps=30,
    timestep_spacing_shift=4.0,
    max_steps=2450,
    batch_size=64,
    learning_rate=2e-3,
    ema_decay=0.998,
    warmup_epochs=0.05,
    precision="bf16",
    eval_num_samples=1000,
)
