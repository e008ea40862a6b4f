"""AdamW at B = 512, for every parameter: a reference with settings known from elsewhere, not tuned by us."""

optimizer = "adamw"
lr = 1.8e-3
weight_decay = 0.1
schedule = "linear"
warmup_steps = 256
