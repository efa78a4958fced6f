"""Inpainting of MNIST: what was in the hole. See docs/conditioning.md.

python train.py --config configs/mnist_inpaint.py

The network and training of mnist_unet.py without its classes. Not yet run.
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
