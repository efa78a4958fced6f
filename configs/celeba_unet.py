"""Unconditional CelebA faces, centre-cropped, at 64x64.

Sized for GPUs.

torchrun --standalone --nproc_per_node=8 train.py --config configs/celeba_unet.py

Not yet run to the end.
"""

config = dict(
    dataset="celeba",
    image_size=64,
    model_type="unet",
    model_params=dict(
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        dropout=0.0,
    ),
    epochs=100,
    batch_size=128,
    learning_rate=1e-4,
    ema_decay=0.9999,
    use_scheduler=True,
    scheduler_type="warmup_cosine",
    warmup_epochs=1,
    num_workers=8,
    save_interval=5,
    sample_interval=5,
    num_samples=64,
    num_inference_steps=100,
)
