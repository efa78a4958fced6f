"""Class-conditional CIFAR-10 with DiT-S/2: 256 tokens of 2x2 pixels.

Sized for GPUs with 12 GB or more.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar10_dit.py

Not yet run to the end.
"""

config = dict(
    dataset="cifar10",
    conditional=True,
    model_type="dit",
    model_params=dict(
        patch_size=2,
        hidden_size=384,
        depth=12,
        num_heads=6,
        mlp_ratio=4.0,
        dropout=0.0,
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
    sample_interval=20,
    num_samples=100,
    num_inference_steps=50,
)
