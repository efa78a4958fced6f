"""python train.py --config tests/own_parts/own.py: a run of own parts, none of them in a table."""

config = dict(
    model_type="own_parts:Pointwise",
    model_params=dict(width=16),
    dataset="own_parts:levels",
    conditional=True,
    beta_schedule="own_parts:constant_betas",
    optimizer="own_parts:sign_descent",
    sampling_method="own_parts:half_ddim",
    num_inference_steps=6,
    eval_metrics=("own_parts:Darkness", "sanity"),
    eval_num_samples=16,
    batch_size=32,
    epochs=4,
    save_interval=2,
    num_samples=4,
)
