"""Class-conditional CIFAR-10 with a Diffusion Mamba of 29 M parameters, as DiM-S/2 but 384 wide.

Sized for GPUs with 24 GB or more; docs/dim.md says how to install the CUDA kernels of mamba-ssm.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar10_dim.py

Not yet run to the end.
"""

config = dict(
    dataset="cifar10",
    conditional=True,
    model_type="dim",
    model_params=dict(
        size="384x25/2",
        state_size=16,
        mlp_ratio=0.0,
        dropout=0.0,
    ),
    cfg_scale=1.5,
    epochs=2000,
    batch_size=256,
    learning_rate=2e-4,
    weight_decay=0.03,
    ema_decay=0.9999,
    use_scheduler=True,
    scheduler_type="warmup_cosine",
    warmup_epochs=10,
    save_interval=50,
    sample_interval=20,
    num_samples=100,
    num_inference_steps=50,
)
