"""Class-conditional CIFAR-10 with the 35M-parameter network of the DDPM paper.

Sized for GPUs.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar10_unet.py

Not yet run to the end.
"""

config = dict(
    dataset="cifar10",
    conditional=True,
    model_type="unet",
    model_params=dict(
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        dropout=0.1,
    ),
    cfg_scale=1.5,
    epochs=2000,
    batch_size=256,
    learning_rate=2e-4,
    ema_decay=0.9999,
    use_scheduler=True,
    scheduler_type="warmup_cosine",
    warmup_epochs=10,
    save_interval=50,
    keep_last=10,
    sample_interval=20,
    num_samples=100,
    num_inference_steps=50,
)
