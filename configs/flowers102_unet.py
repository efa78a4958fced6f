"""Class-conditional Oxford Flowers 102, 7,169 photos of 102 kinds, centre-cropped, at 64x64.

Otherwise celeba_unet.py. Sized for GPUs; 0.1 dropout, because there are few images.

torchrun --standalone --nproc_per_node=8 train.py --config configs/flowers102_unet.py

By DDPM in all 1,000 steps, and by DDIM in 100:

python sample.py --checkpoint checkpoints/flowers102_unet --sampling_method ddpm
python sample.py --checkpoint checkpoints/flowers102_unet --sampling_method ddim

Not yet run to the end.
"""

config = dict(
    _base_="celeba_unet.py",
    dataset="flowers102",
    conditional=True,
    model_params=dict(dropout=0.1),
    cfg_scale=1.5,
    epochs=2000,
    warmup_epochs=10,
    save_interval=50,
    sample_interval=50,
    keep_last=10,
    num_samples=102,
)
