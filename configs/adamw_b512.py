"""AdamW for every parameter at B = 512: a reference. The settings are known from elsewhere and were not tuned here."""

optimizer = "adamw"
lr = 1.8e-3
weight_decay = 0.1
schedule = "linear"
warmup_steps = 256
